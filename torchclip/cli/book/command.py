"""The command ``torchclip book``: runs the book's chapter on exploding gradients as experiments."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

from torchclip.cli.book import figure
from torchclip.cli.book.experiments import BATCH, MAX_NORM, gradient_norms, tanh_curve
from torchclip.cli.book.lesson import SECTIONS, tell
from torchclip.cli.figures import save
from torchclip.cli.options import directory_to_write
from torchclip.cli.terminal import Console, console_for

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    titles = "; ".join(f"{i}: {title}" for i, title in enumerate(SECTIONS, start=1))
    parser.add_argument(
        "--section",
        type=int,
        choices=range(1, len(SECTIONS) + 1),
        metavar="N",
        help=f"print one section only ({titles})",
    )
    parser.add_argument(
        "--plot",
        "--figures",
        dest="figures",
        metavar="DIR",
        type=directory_to_write,
        help="also write the figures there, as PNG",
    )


def run(figures: Path | None, section: int | None = None) -> None:
    """Print the lesson, in a pager on a terminal; with a directory ``figures``, also draw its figures.

    Args:
        figures: where the figures go, made if it does not exist; figures of an earlier run are replaced.
        section: the number of the only section to print, from 1, and to draw.

    Raises:
        OSError: if the directory cannot be made or written to.
    """
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
    console = console_for(80)
    titles = list(SECTIONS) if section is None else [list(SECTIONS)[section - 1]]
    with console.pager() if section is None and console.is_terminal else nullcontext():
        for title in titles:
            tell(title, console)
    if figures is not None:
        _draw(console, figures, section)


def _draw(console: Console, directory: Path, section: int | None) -> None:
    unclipped, vanishing, clipped = gradient_norms(1.0), gradient_norms(0.5), gradient_norms(1.0, MAX_NORM)
    figures = {
        "tanh.png": (1, figure.tanh_figure(*tanh_curve())),
        "exploding.png": (2, figure.gradient_norms_figure(unclipped, "Exploding gradients")),
        "vanishing.png": (2, figure.gradient_norms_figure(vanishing, "Vanishing gradients")),
        "clipped.png": (3, figure.clipped_norms_figure(unclipped, clipped, MAX_NORM / BATCH)),
    }
    wanted = {name: drawn for name, (of, drawn) in figures.items() if section in (None, of)}
    if not wanted:
        console.print("This section has no figures.")
        return
    console.print("Figures:")
    for name, drawn in wanted.items():
        save(drawn, directory / name)
        console.print(f"  {directory / name}", markup=False, highlight=False, soft_wrap=True)
