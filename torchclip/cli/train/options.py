"""What the numbers of a training depend on, and the options of ``torchclip train``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import get_args

from torchclip.cli.options import count, file_to_read, file_to_write, max_norm, picture_file, positive, seed
from torchclip.cli.thresholds import LEARNED
from torchclip.cli.train.parallel import Way

# The learning rates are as high as training with clipping bears; that is what clipping is good for.
LEARNING_RATES = {"rnn": 3.0, "lstm": 30.0, "transformer": 0.01}
MAX_NORMS = {"rnn": 0.5, "lstm": 0.25, "transformer": 1.0}
THRESHOLDS = ("fixed", *LEARNED)


@dataclass(frozen=True)
class Options:
    """What the numbers of a run depend on, besides the text."""

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
    described = "; ".join(f"{name}: {what}" for name, what in LEARNED.items())
    rates, max_norms = _by_cell(LEARNING_RATES), _by_cell(MAX_NORMS)
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
        choices=THRESHOLDS,
        default="fixed",
        help=f"to what gradients are clipped: fixed: --max-norm; {described} (default: %(default)s)",
    )
    add(
        "--max-norm",
        type=max_norm,
        metavar="X",
        help=f"the fixed threshold (default: {max_norms}); for the others a ceiling (default: none)",
    )
    add(
        "--lr",
        type=positive,
        metavar="X",
        help=f"learning rate of SGD, or of AdamW for a transformer (default: {rates})",
    )
    add(
        "--warmup",
        type=count,
        metavar="N",
        default=1,
        help="steps in which the learning rate rises to its full height (default: %(default)s)",
    )
    add("--steps", type=count, metavar="N", default=300, help="training steps (default: %(default)s)")
    add("--hidden", type=count, metavar="N", default=128, help="hidden units (default: %(default)s)")
    add("--batch", type=count, metavar="N", default=32, help="streams of text (default: %(default)s)")
    add("--bptt", type=count, metavar="N", default=64, help="characters a step (default: %(default)s)")
    add("--seed", type=seed, metavar="N", default=0, help="same seed, same numbers (default: %(default)s)")
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


def _by_cell(defaults: dict[str, float]) -> str:
    return ", ".join(f"{value:g} for {cell}" for cell, value in defaults.items())
