"""What the figures of the commands have in common: their style, and saving them.

Figures are made as objects, without ``pyplot``, so there is no window and no global state.  matplotlib comes
with the ``demo`` extra and is imported when a figure is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from torchclip.cli.options import writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BLUE", "GRAY", "GREEN", "SKY", "VERMILION", "Array", "new_figure", "save", "steps", "style"]

Array = NDArray[Any]

# Of Okabe and Ito's palette, which colour-blind readers can distinguish.
BLUE, VERMILION, GREEN, SKY = "#0072B2", "#D55E00", "#009E73", "#56B4E9"
GRAY = "#808080"  # readable on white and on black, as the pictures are transparent

_STYLE: Any = {
    **dict.fromkeys(["figure.facecolor", "axes.facecolor"], "none"),
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], GRAY),
    **dict.fromkeys(["axes.spines.top", "axes.spines.right", "legend.frameon"], False),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.color": GRAY,
    "figure.dpi": 120,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "torchclip",  # the same figure, the same file
}


@contextmanager
def style() -> Iterator[None]:
    """Use the style of the commands within the context; also a decorator for functions that make figures."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure without axes, of a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the file's ending."""
    with writing(path):
        figure.savefig(path)


def steps(values: Sequence[float] | Array) -> range:
    """The step numbers, from 1."""
    return range(1, len(values) + 1)
