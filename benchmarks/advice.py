"""How good the advice of ``history.suggest()`` and of ``torchclip run --try auto`` is, on runs that need it.

    pip install '.[demo]'
    python benchmarks/advice.py [--model rnn|lstm|transformer|transformer-sgd] [--seeds 5]

Three character models learn from Python's documentation, at learning rates from low to exploding: with SGD,
the Transformer also with AdamW.  The advice comes from one run without clipping.  It is compared with no
clipping, with the best of a grid of thresholds, and with the search of ``--try auto``.  The loss is the mean
over the last tenth of the steps.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from language_model import batches, in_parallel, new_model, optimizer_of
from language_model import train as trained

import torchclip
from torchclip.cli.options import count
from torchclip.cli.run.search import Outcome, search
from torchclip.history.history import History
from torchclip.history.signs import final_loss

STEPS = 250
GRID = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
LEARNING_RATES = {
    "rnn": (0.5, 3.0, 5.0),
    "lstm": (3.0, 10.0, 30.0),
    "transformer": (0.002, 0.01, 0.03),
    "transformer-sgd": (0.5, 2.0, 5.0),
}
"""From usual to exploding without clipping; with AdamW the Transformer does not explode."""


class Setting(NamedTuple):
    """Everything but the threshold on which a run depends."""

    model: str
    lr: float
    seed: int


class Found(NamedTuple):
    """The final loss for each way of clipping."""

    none: float
    grid: tuple[float, ...]
    advised: float
    auto: float
    max_norm: float | None
    explodes: bool


def train(setting: Setting, max_norm: float) -> History:
    """Train once; the run ends at a loss that is not finite."""
    model = new_model(setting.model.removesuffix("-sgd"), setting.seed)
    optimizer = optimizer_of(setting.model, model, setting.lr)
    clipper = torchclip.Clipper(optimizer, max_norm)
    for loss in trained(model, [optimizer], batches(STEPS)):
        clipper.loss = loss.item()
    return clipper.history


def loss_of(history: History) -> float:
    """The final loss, as ``torchclip run --try`` computes it."""
    found = final_loss([math.nan if record.loss is None else record.loss for record in history])
    return found if math.isfinite(found) else math.inf


def compare(setting: Setting) -> Found:
    """All ways of clipping, for one model, learning rate and seed."""
    done: dict[float, History] = {}

    def run(max_norm: float) -> History:
        if max_norm not in done:
            done[max_norm] = train(setting, max_norm)
        return done[max_norm]

    def outcomes(thresholds: Sequence[float]) -> list[Outcome]:
        return [Outcome(threshold, loss_of(run(threshold)), run(threshold)) for threshold in thresholds]

    unclipped = run(math.inf)
    advice = unclipped.suggest()
    advised = math.inf if advice.max_norm is None else advice.max_norm
    best = min(search(outcomes), key=lambda outcome: outcome.loss)
    return Found(
        none=loss_of(unclipped),
        grid=tuple(loss_of(run(max_norm)) for max_norm in GRID),
        advised=loss_of(run(advised)),
        auto=best.loss,
        max_norm=advice.max_norm,
        explodes=advice.explodes is not None,
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=LEARNING_RATES, help="one of the models (default: all)")
    parser.add_argument("--seeds", type=count, default=5, metavar="N", help="runs a cell (default: 5)")
    arguments = parser.parse_args()
    models = [arguments.model] if arguments.model else [*LEARNING_RATES]
    cells = [(model, lr) for model in models for lr in LEARNING_RATES[model]]
    settings = [Setting(*cell, seed) for cell in cells for seed in range(arguments.seeds)]
    found = in_parallel(compare, settings)
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}; mean of {arguments.seeds} seeds\n")
    print("| run | no clipping | advised `max_norm` | its loss | `--try auto` | best of the grid |")
    print("|---|---:|---:|---:|---:|---:|")
    for i, (model, lr) in enumerate(cells):
        print(row(model, lr, found[i * arguments.seeds : (i + 1) * arguments.seeds]))


def row(model: str, lr: float, found: list[Found]) -> str:
    """A row of the table: means over the seeds, and their distances from the best of the grid."""
    best, max_norm = min(
        (mean(each.grid[i] for each in found), threshold) for i, threshold in enumerate(GRID)
    )
    numbers = sorted(each.max_norm for each in found if each.max_norm is not None)
    advised = " to ".join(dict.fromkeys(f"{norm:g}" for norm in (numbers[:1] + numbers[-1:]))) or "none"
    unclipped = mean(each.none for each in found)
    spread = [each.none for each in found if math.isfinite(each.none)]
    none = f"{unclipped:.2f}" + (f" ± {statistics.stdev(spread):.2f}" if len(spread) > 1 else "")
    explodes = sum(each.explodes for each in found)
    cells = [none + (f", {explodes} exploded" if explodes else ""), advised]
    for way in (mean(each.advised for each in found), mean(each.auto for each in found)):
        cells.append(f"{way:.3f} ({way / best - 1:+.1%})")
    return f"| {model}, lr {lr:g} | {' | '.join(cells)} | {best:.3f} at {max_norm:g} |"


def mean(values: Any) -> float:
    """The mean, infinite if one of the values is."""
    return statistics.fmean(values)


if __name__ == "__main__":
    main()
