"""How well the RNN of ``torchclip train`` learns with each threshold, over several seeds.

    pip install '.[demo]'
    python benchmarks/thresholds.py [--seeds 5]

Whether a run that is hardly clipped recovers from an explosion depends on the seed, and on how a processor
rounds; so every cell is the median perplexity of several runs, with the smallest and the largest.  Every run
has one thread; several are trained at the same time.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from multiprocessing import get_context
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from torchclip.cli.options import count
from torchclip.cli.train import display, training
from torchclip.cli.train.options import Options, add_arguments

THRESHOLDS: dict[str, dict[str, Any]] = {
    "none": {"max_norm": math.inf},
    **{f"{max_norm:g}": {"max_norm": max_norm} for max_norm in (5, 1, 0.5, 0.25, 0.1)},
    "`Percentile(10)`": {"threshold": "percentile", "max_norm": math.inf},
    "`ZScore()`": {"threshold": "zscore", "max_norm": math.inf},
    "`ZScore(max_norm=1.0)`": {"threshold": "zscore", "max_norm": 1.0},
}
SETTINGS: dict[str, dict[str, Any]] = {
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


def final_perplexity(changes: dict[str, Any]) -> float:
    """Train once: the perplexity of the last steps, infinite if it diverged."""
    torch.set_num_threads(1)
    text = training.read_text(None)
    vocabulary = "".join(sorted(set(text)))
    options = options_of(changes)
    (run,) = training.start_runs("clipped", vocabulary, options)
    training.advance([run], training.encode(text, vocabulary), options)
    loss = statistics.fmean(step.loss for step in run.steps[-display.RECENT :])
    found = display.perplexity(loss)
    return found if found < DIVERGED else math.inf


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
    parser.add_argument("--seeds", type=count, default=5, metavar="N", help="runs a cell (default: 5)")
    seeds = range(parser.parse_args().seeds)
    runs = [t | s | {"seed": seed} for t in THRESHOLDS.values() for s in SETTINGS.values() for seed in seeds]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        trained = pool.map(final_perplexity, runs)
        found = iter(list(track(trained, "Training", len(runs), console=Console(stderr=True))))

    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}; perplexities of {len(seeds)} runs")
    print("\n| threshold |", " | ".join(SETTINGS), "|\n|---|" + "---:|" * len(SETTINGS))
    for name in THRESHOLDS:
        print(f"| {name} |", " | ".join(cell([next(found) for _ in seeds]) for _ in SETTINGS), "|")


if __name__ == "__main__":
    main()
