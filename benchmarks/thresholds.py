"""How well the models of ``torchclip train`` learn with each way of clipping, over several seeds.

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
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

import torchclip
from torchclip.cli.figures import BLUE, VERMILION, new_figure, save, style
from torchclip.cli.options import count, picture_file
from torchclip.cli.train import display, training
from torchclip.cli.train.model import detached, new_model
from torchclip.cli.train.options import Options, add_arguments

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

MODELS: dict[str, dict[str, Any]] = {
    "rnn": {"cell": "rnn", "lr": 3.0, "hidden": 64, "batch": 16, "steps": 350},
    "transformer": {"cell": "transformer", "lr": 0.01, "hidden": 64, "batch": 16, "steps": 350},
}
TITLES = {"rnn": "RNN, SGD", "transformer": "Transformer, AdamW"}
SPOILT_EVERY = 150

THRESHOLDS: dict[str, dict[str, Any]] = {
    "none": {"max_norm": math.inf},
    **{f"{max_norm:g}": {"max_norm": max_norm} for max_norm in (5, 1, 0.5, 0.25, 0.1)},
    "`Percentile(10)`": {"threshold": "percentile", "max_norm": math.inf},
    "`ZScore()`": {"threshold": "zscore", "max_norm": math.inf},
    "`ZScore(max_norm=1.0)`": {"threshold": "zscore", "max_norm": 1.0},
}
LEARNING_RATES: dict[str, dict[str, Any]] = {
    "`--lr 1`": {"lr": 1.0},
    "`--lr 3`": {"lr": 3.0},
    "`--lr 3 --warmup 100`": {"lr": 3.0, "warmup": 100},
    "`--lr 10`": {"lr": 10.0},
}
DIVERGED = 1e15


def options_of(changes: dict[str, Any]) -> Options:
    """The command's defaults, with changes."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = vars(parser.parse_args([]))
    return Options(**{field.name: defaults[field.name] for field in fields(Options)} | changes)


def read() -> tuple[str, Tensor]:
    """The vocabulary and the text."""
    text = training.read_text(None)
    vocabulary = "".join(sorted(set(text)))
    return vocabulary, training.encode(text, vocabulary)


def perplexity_of(losses: Sequence[float]) -> float:
    """The perplexity of the last steps, infinite if the run diverged."""
    found = display.perplexity(statistics.fmean(losses[-display.RECENT :]))
    return found if found < DIVERGED else math.inf


# The spoilt text


def spoilt(batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of which every ``SPOILT_EVERY``-th repeats its first few characters."""
    for step, (inputs, targets) in enumerate(batches):
        if step and step % SPOILT_EVERY == 0:
            repeated = inputs[:1, :4].repeat(len(inputs), inputs.shape[1] // 4 + 1)
            inputs, targets = repeated[:, : inputs.shape[1]], repeated[:, 1 : inputs.shape[1] + 1]
        yield inputs, targets


def train_on_spoilt(run: tuple[str, str, int]) -> float:
    """Train once, with a model, a way of clipping and a seed."""
    name, way, seed = run
    torch.set_num_threads(1)
    vocabulary, tokens = read()
    options = options_of(MODELS[name] | {"seed": seed, "max_norm": math.inf})
    torch.manual_seed(seed)
    model = new_model(options.cell, len(vocabulary), options.hidden)
    optimizer_class = torch.optim.AdamW if options.cell == "transformer" else torch.optim.SGD
    optimizer = optimizer_class(model.parameters(), lr=options.lr)
    WAYS[way](optimizer)
    losses: list[float] = []
    state = None
    for step, (inputs, targets) in enumerate(spoilt(training.batches(tokens, options))):
        scores, state = model(inputs, detached(state))
        loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
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


@style()
def draw(results: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """A panel for each model, a row for each way of clipping, a dot for each run; lines mark medians."""
    figure = new_figure(10, 4.5)
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (model, ways) in zip(panels, results.items(), strict=True):
        least, worst = min(map(min, ways.values())), max(map(max, ways.values()))
        most = min(worst, 3 * least)
        for y, found in enumerate(ways.values()):
            x = [min(perplexity, most) for perplexity in found]
            axes.plot(x, [y] * len(x), "o", color=BLUE, alpha=0.6, markersize=6, clip_on=False)
            median = min(statistics.median(found), most)
            axes.plot([median], [y], "|", color=VERMILION, markersize=18, mew=2.5, clip_on=False)
        axes.set_title(f"{TITLES[model]}, learning rate {MODELS[model]['lr']:g}")
        axes.set(xscale="log", xlim=(0.98 * least, 1.02 * most), xlabel="final perplexity")
        ticks = [least * (most / least) ** (i / 3) for i in range(4)]
        labels = [f"{tick:.1f}" for tick in ticks]
        axes.set_xticks(ticks, [*labels[:-1], labels[-1] + (" and more" if worst > most else "")])
        axes.minorticks_off()
        axes.grid(False, axis="y")
    panels[0].set_yticks(range(len(WAYS)), list(WAYS))
    panels[0].invert_yaxis()
    save(figure, path)


# Learning rates


def final_perplexity(changes: dict[str, Any]) -> float:
    """Train once as the command does."""
    torch.set_num_threads(1)
    vocabulary, tokens = read()
    options = options_of(changes)
    (run,) = training.start_runs("clipped", vocabulary, options)
    training.advance([run], tokens, options)
    return perplexity_of(run.losses)


def by_learning_rate(seeds: range) -> None:
    """A table of thresholds and learning rates."""
    cells = [(t, s) for t in THRESHOLDS for s in LEARNING_RATES]
    runs = [THRESHOLDS[t] | LEARNING_RATES[s] | {"seed": seed} for t, s in cells for seed in seeds]
    found = iter(in_parallel(final_perplexity, runs))
    print("\n| threshold |", " | ".join(LEARNING_RATES), "|\n|---|" + "---:|" * len(LEARNING_RATES))
    for name in THRESHOLDS:
        print(f"| {name} |", " | ".join(cell([next(found) for _ in seeds]) for _ in LEARNING_RATES), "|")


# Both


def in_parallel(train: Callable[[Any], float], runs: Sequence[Any]) -> list[float]:
    """The results of all runs, with a progress bar and the remaining time."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        trained = pool.map(train, runs)
        return list(track(trained, "Training", len(runs), console=Console(stderr=True)))


def shown(perplexity: float) -> str:
    """A perplexity as people write it."""
    if math.isinf(perplexity):
        return "diverged"
    return f"{perplexity:.1e}" if perplexity >= 1e5 else f"{perplexity:,.{1 if perplexity < 100 else 0}f}"


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
