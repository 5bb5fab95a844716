"""The command ``torchclip book``: runs the book's chapter on exploding gradients as experiments."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from torchclip.cli.book import figure, lesson
from torchclip.cli.book.experiments import BATCH, MAX_NORM, gradient_norms, tanh_curve
from torchclip.cli.options import directory_to_write, writing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--figures", metavar="DIR", type=directory_to_write, help="also write the four figures there, as PNG"
    )


def run(figures: Path | None) -> None:
    """Print the lesson; with a directory ``figures``, also write its four figures there as PNG.

    Args:
        figures: where the figures go, made if it does not exist; figures of an earlier run are replaced.

    Raises:
        OSError: if the directory cannot be made or written to.
    """
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
    console = Console(width=min(Console().width, 80))
    lesson.explain_tanh(console)
    lesson.explain_matmul(console)
    lesson.explain_clipping(console)
    if figures is not None:
        _draw(console, figures)


def _draw(console: Console, directory: Path) -> None:
    unclipped, vanishing, clipped = gradient_norms(1.0), gradient_norms(0.5), gradient_norms(1.0, MAX_NORM)
    figures = {
        "tanh.png": figure.tanh_figure(*tanh_curve()),
        "exploding.png": figure.gradient_norms_figure(unclipped, "Exploding Gradients"),
        "vanishing.png": figure.gradient_norms_figure(vanishing, "Vanishing Gradients"),
        "clipped.png": figure.clipped_norms_figure(unclipped, clipped, MAX_NORM / BATCH),
    }
    console.print("Figures:")
    for name, picture in figures.items():
        with writing(directory / name):
            picture.savefig(directory / name)
        console.print(f"  {directory / name}", markup=False, highlight=False, soft_wrap=True)
