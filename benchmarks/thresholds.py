"""How well the models of ``examples/char_rnn.py`` learn with each way of clipping, over several seeds.

    pip install '.[demo]'
    python benchmarks/thresholds.py [--model rnn|transformer] [--seeds 5] [--plot FILE]
    python benchmarks/thresholds.py --learning-rates [--seeds 5]

The first command compares all ways at a learning rate that is nearly too high, on a spoilt text: every 150th
batch is a few characters, repeated.  The second compares some of them at several learning rates on clean
text.  Whether a run that is hardly clipped recovers depends on the seed, and on how a processor rounds.  So
every cell shows several runs.  Each run has one thread, and several train at the same time.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from language_model import Batches, batches, in_parallel, new_model, optimizer_of, perplexity_of, shown, train
from torch import Tensor

import torchclip
from torchclip.cli.options import count, picture_file

Clippers = Mapping[str, Callable[[torch.optim.Optimizer], torchclip.Clipper]]

WAYS: Clippers = {
    "none": lambda optimizer: torchclip.Clipper(optimizer, math.inf),
    **{
        f"{max_norm:g}": lambda optimizer, max_norm=max_norm: torchclip.Clipper(optimizer, max_norm)  # type: ignore[misc]
        for max_norm in (5.0, 1.0, 0.25)
    },
    "Percentile(10)": lambda optimizer: torchclip.Clipper(optimizer, torchclip.Percentile(10)),
    "ZScore()": lambda optimizer: torchclip.Clipper(optimizer, torchclip.ZScore()),
    "ZScore(max_norm=1)": lambda optimizer: torchclip.Clipper(optimizer, torchclip.ZScore(max_norm=1)),
    "AdaGC()": lambda optimizer: torchclip.Clipper(optimizer, torchclip.AdaGC()),
    "skip_above=RollingSigma()": lambda optimizer: torchclip.Clipper(
        optimizer, math.inf, skip_above=torchclip.RollingSigma(), max_skips=10
    ),
    "1, skip_above=RollingSigma()": lambda optimizer: torchclip.Clipper(
        optimizer, 1.0, skip_above=torchclip.RollingSigma(), max_skips=10
    ),
}
"""The ways that are compared on the spoilt text, by the code that a user would write."""

STEPS = 350
MODELS = {"rnn": 3.0, "transformer": 0.01}
"""The learning rates."""
TITLES = {"rnn": "RNN, SGD", "transformer": "Transformer, AdamW"}
SPOILT_EVERY = 150

THRESHOLDS: dict[str, Callable[[], Any]] = {
    "none": lambda: math.inf,
    **{f"{max_norm:g}": lambda max_norm=max_norm: max_norm for max_norm in (5, 1, 0.5, 0.25, 0.1)},  # type: ignore[misc]
    "`Percentile(10)`": lambda: torchclip.Percentile(10),
    "`ZScore()`": torchclip.ZScore,
    "`ZScore(max_norm=1.0)`": lambda: torchclip.ZScore(max_norm=1.0),
}
LEARNING_RATES = {"1": (1.0, 1), "3": (3.0, 1), "3, warm-up of 100": (3.0, 100), "10": (10.0, 1)}
"""Each with the steps in which it rises to its full height."""


# The spoilt text


def spoilt(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of which every ``SPOILT_EVERY``-th repeats its first few characters."""
    for step, (inputs, targets) in enumerate(batches):
        if step and step % SPOILT_EVERY == 0:
            repeated = inputs[:1, :4].repeat(len(inputs), inputs.shape[1] // 4 + 1)
            inputs, targets = repeated[:, : inputs.shape[1]], repeated[:, 1 : inputs.shape[1] + 1]
        yield inputs, targets


def train_on_spoilt(run: tuple[str, str, int]) -> float:
    """Train once, with a model, a way of clipping and a seed: the final perplexity on the usual batches."""
    kind, way, seed = run
    model = new_model(kind, seed)
    optimizer = optimizer_of(kind, model, MODELS[kind])
    WAYS[way](optimizer)
    losses = []
    for step, loss in enumerate(train(model, [optimizer], spoilt(batches(STEPS)))):
        if not loss.isfinite():
            return math.inf
        if not step or step % SPOILT_EVERY:
            losses.append(loss.item())
    return perplexity_of(losses)


def compare(models: Sequence[str], seeds: range, plot: Path | None) -> None:
    """Compare all ways: a table and, on request, a picture."""
    runs = [(model, way, seed) for model in models for way in WAYS for seed in seeds]
    found = dict(zip(runs, in_parallel(train_on_spoilt, runs), strict=True))
    results = {m: {way: [found[m, way, seed] for seed in seeds] for way in WAYS} for m in models}
    print("\n| `max_norm` |", " | ".join(f"{m}: median | worst" for m in models), "|")
    print("|---|" + "---:|---:|" * len(models))
    for way in WAYS:
        cells = (
            f"{shown(statistics.median(results[m][way]))} | {shown(max(results[m][way]))}" for m in models
        )
        print(f"| `{way}` |", " | ".join(cells), "|")
    if plot is not None:
        draw(results, plot)


def draw(results: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """A panel for each model, a row for each way of clipping, a dot for each run; lines mark medians."""
    from matplotlib.figure import Figure

    figure = Figure((10, 4.5), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (model, ways) in zip(panels, results.items(), strict=True):
        least, worst = min(map(min, ways.values())), max(map(max, ways.values()))
        most = min(worst, 3 * least)
        for y, found in enumerate(ways.values()):
            x = [min(perplexity, most) for perplexity in found]
            axes.plot(x, [y] * len(x), "o", color="C1", alpha=0.6, markersize=6, clip_on=False)
            median = min(statistics.median(found), most)
            axes.plot([median], [y], "|", color="C0", markersize=18, mew=2.5, clip_on=False)
        axes.set_title(f"{TITLES[model]}, learning rate {MODELS[model]:g}")
        axes.set(xscale="log", xlim=(0.98 * least, 1.02 * most), xlabel="final perplexity")
        ticks = [least * (most / least) ** (i / 3) for i in range(4)]
        labels = [f"{tick:.1f}" for tick in ticks]
        axes.set_xticks(ticks, [*labels[:-1], labels[-1] + (" and more" if worst > most else "")])
        axes.minorticks_off()
        axes.grid(False, axis="y")
    panels[0].set_yticks(range(len(WAYS)), list(WAYS))
    panels[0].invert_yaxis()
    figure.savefig(path)


# Learning rates


def final_perplexity(run: tuple[str, str, int]) -> float:
    """Train the RNN once as the example does, with a threshold, a learning rate and a seed."""
    threshold, rate, seed = run
    lr, warm_up = LEARNING_RATES[rate]
    model = new_model("rnn", seed, hidden=128)
    optimizer = optimizer_of("rnn", model, lr)
    torchclip.Clipper(optimizer, THRESHOLDS[threshold]())
    losses = []
    for step, loss in enumerate(train(model, [optimizer], batches(300, batch=32))):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / warm_up)
        losses.append(loss.item())
    return perplexity_of(losses)


def by_learning_rate(seeds: range) -> None:
    """A table of thresholds and learning rates."""
    runs = [(t, rate, seed) for t in THRESHOLDS for rate in LEARNING_RATES for seed in seeds]
    found = iter(in_parallel(final_perplexity, runs))
    print("\n| threshold |", " | ".join(LEARNING_RATES), "|\n|---|" + "---:|" * len(LEARNING_RATES))
    for name in THRESHOLDS:
        print(f"| {name} |", " | ".join(cell([next(found) for _ in seeds]) for _ in LEARNING_RATES), "|")


def cell(perplexities: list[float]) -> str:
    """The median of the runs, and their range."""
    low, high = shown(min(perplexities)), shown(max(perplexities))
    middle = shown(statistics.median(perplexities))
    return middle if low == high else f"{middle} ({low} to {high})"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, help="one of the models (default: all)")
    parser.add_argument("--seeds", type=count, default=5, metavar="N", help="runs a cell (default: 5)")
    parser.add_argument("--learning-rates", action="store_true", help="the table of learning rates instead")
    parser.add_argument("--plot", type=picture_file, metavar="FILE", help="draw the comparison")
    arguments = parser.parse_args()
    seeds = range(arguments.seeds)
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}; perplexities of {len(seeds)} runs")
    if arguments.learning_rates:
        by_learning_rate(seeds)
    else:
        compare([arguments.model] if arguments.model else [*MODELS], seeds, arguments.plot)


if __name__ == "__main__":
    main()
