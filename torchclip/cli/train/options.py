"""The options of ``torchclip train``, and those of them on which its numbers depend."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from torchclip.cli.options import count, file_to_read, file_to_write, max_norm, picture_file, positive, seed
from torchclip.cli.thresholds import DESCRIBED, LEARNED, refuse_ceiling
from torchclip.cli.train.parallel import Way

# The learning rates are as high as clipping allows, to show what it is good for.
LEARNING_RATES = {"rnn": 3.0, "lstm": 30.0, "transformer": 0.01}
MAX_NORMS = {"rnn": 0.5, "lstm": 0.25, "transformer": 1.0}


@dataclass(frozen=True)
class Options:
    """Everything but the text on which the numbers of a run depend."""

    cell: str
    hidden: int
    lr: float
    warmup: int
    threshold: str
    max_norm: float
    steps: int
    batch: int
    bptt: int
    seed: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``torchclip train``."""
    add = parser.add_argument

    def number(name: str, kind: Callable[[str], object], default: int, meaning: str) -> None:
        add(name, type=kind, metavar="N", default=default, help=f"{meaning} (default: %(default)s)")

    add(
        "--text",
        type=file_to_read,
        metavar="FILE",
        help="UTF-8 text to learn from (default: Python's documentation)",
    )
    add("--only", choices=["clipped", "unclipped"], help="one run instead of both")
    add(
        "--cell",
        choices=[*LEARNING_RATES],
        default="rnn",
        help="tanh RNN, LSTM or transformer (default: %(default)s)",
    )
    add(
        "--threshold",
        choices=["fixed", *LEARNED],
        default="fixed",
        help=f"to what gradients are clipped: fixed: --max-norm; {DESCRIBED} (default: %(default)s)",
    )
    add(
        "--max-norm",
        type=max_norm,
        metavar="X",
        help=f"the fixed threshold (default: {_by_cell(MAX_NORMS)}); a ceiling for the others",
    )
    rates = _by_cell(LEARNING_RATES)
    add("--lr", type=positive, metavar="X", help=f"learning rate (default: {rates})")
    number("--warmup", count, 1, "steps in which the learning rate rises to its full height")
    number("--steps", count, 300, "training steps")
    number("--hidden", count, 128, "hidden units")
    number("--batch", count, 32, "streams of text")
    number("--bptt", count, 64, "characters a step")
    number("--seed", seed, 0, "same seed, same numbers")
    add(
        "--parallel",
        dest="way",
        choices=get_args(Way),
        help="how the processes that torchrun started train one model (default: fsdp)",
    )
    add("--plot", type=picture_file, metavar="FILE", help="draw loss and gradient norm (PNG, SVG or PDF)")
    add("--html", type=file_to_write, metavar="FILE", help="write a page about the norms, for a browser")
    add(
        "--save",
        type=file_to_write,
        metavar="FILE",
        help="store the clipped (or only) model; torchclip.cli.train.model.load_model reads it",
    )


def with_defaults(
    cell: str, threshold: str, lr: float | None = None, max_norm: float | None = None, **others: int
) -> Options:
    """The options, with the cell's learning rate and threshold where none is given.

    Raises:
        argparse.ArgumentError: for a ceiling that the threshold does not use.
    """
    refuse_ceiling(threshold, max_norm)
    if max_norm is None:
        max_norm = MAX_NORMS[cell] if threshold == "fixed" else math.inf
    return Options(cell=cell, lr=lr or LEARNING_RATES[cell], threshold=threshold, max_norm=max_norm, **others)


def _by_cell(defaults: dict[str, float]) -> str:
    return ", ".join(f"{value:g} for {cell}" for cell, value in defaults.items())
