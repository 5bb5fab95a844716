"""The book's chapter: the text of lesson.md, with its numbers from NumPy and from torch side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.markdown import Markdown
from rich.padding import Padding
from rich.table import Table

from torchclip.cli.book.experiments import (
    BATCH,
    HIDDEN,
    MAX_NORM,
    STEPS,
    gradient_norms,
    gradient_norms_torch,
    large_gradients,
    recurrent_weights,
    tanh_curve,
    tanh_curve_torch,
    worked_example,
    worked_example_torch,
)
from torchclip.cli.figures import Array

__all__ = ["SECTIONS", "tell"]

# The width of a terminal, in columns, from which a table has all its parts.
WIDE, MEDIUM, NARROW = 78, 58, 45


def _norms(title: str, scale: float, **limit: float) -> Callable[[int], Table]:
    return lambda width: _series(
        width, title, 1, 1, gradient_norms(scale, **limit), gradient_norms_torch(scale, **limit)
    )


def _curve(title: str, which: int) -> Callable[[int], Table]:
    return lambda width: _series(width, title, -5, 0.1, tanh_curve()[which], tanh_curve_torch()[which])


SHOWN: dict[str, Callable[[int], Table | str]] = {
    "tanh": _curve("tanh(h): from each h on, in steps of 0.1", 1),
    "derivative": _curve("dy/dh at the same h; in torch by autograd", 2),
    "weights": lambda _: _decimals(recurrent_weights(1.0)),
    "exploding": _norms("Exploding gradients", 1.0),
    "half the weights": lambda _: _decimals(recurrent_weights(0.5)),
    "vanishing": _norms("Vanishing gradients", 0.5),
    "clipped": _norms("Exploding gradients, clipped at each step", 1.0, max_norm=MAX_NORM),
    "two gradients": lambda width: _example(width, large_gradients()[0]),
    "three gradients": lambda width: _example(width, large_gradients()[1]),
}
"""What replaces a line of lesson.md with ``%`` and one of these names, given the console's width."""

SECTIONS = {
    title: lesson.strip().split("\n\n")
    for part in Path(__file__).with_name("lesson.md").read_text(encoding="utf-8").split("%% ")[1:]
    for title, _, lesson in [part.partition("\n")]
}
"""The paragraphs of each section, by its title."""


def tell(title: str, console: Console) -> None:
    """Print a section."""
    exploding, vanishing = gradient_norms(1.0), gradient_norms(0.5)
    numbers = {
        **{"batch": BATCH, "hidden": HIDDEN, "steps": STEPS},
        **{"max_norm": MAX_NORM, "mean_max_norm": MAX_NORM / BATCH},
        "growth": exploding[-1] / exploding[-2],
        "decay": vanishing[-1] / vanishing[-2],
        "vanished": vanishing[-1],
    }
    prose: list[str] = []

    def end_of_prose() -> None:
        if prose:
            console.print(Markdown("\n\n".join(prose).format(**numbers)), "")
            prose.clear()

    for paragraph in SECTIONS[title]:
        if paragraph.startswith("% "):
            end_of_prose()
            shown = SHOWN[paragraph.removeprefix("% ")](console.width)
            console.print(Padding(shown, (0, 0, 1, 2)), highlight=False)
        else:
            prose.append(paragraph)
    end_of_prose()


def _example(width: int, grads: Sequence[Array]) -> Table:
    """The worked example, with NumPy and torch side by side; in a narrow terminal only NumPy."""
    sides = {"NumPy": worked_example(grads), "torch": worked_example_torch(grads)}
    if width < MEDIUM:
        del sides["torch"]
    names = [f"dW{i + 1}" for i in range(len(grads))]
    table = Table("", *sides, box=SIMPLE, show_edge=False, pad_edge=width >= NARROW)
    for name, grad in zip(names, grads, strict=True):
        table.add_row(name, *([_decimals(grad)] * len(sides)))
    table.add_section()
    table.add_row("norm", *(_decimals(side.norm) for side in sides.values()))
    table.add_row("rate", *(_decimals(side.rate) for side in sides.values()), end_section=True)
    for i, name in enumerate(names):
        table.add_row(f"{name}, clipped", *(_decimals(side.clipped[i]) for side in sides.values()))
    table.add_section()
    table.add_row("norm, clipped", *(_decimals(side.clipped_norm) for side in sides.values()))
    return table


def _series(width: int, title: str, first: float, step: float, values: Array, torchs: Array) -> Table:
    """Lines of ten values, or five: NumPy's above torch's, labelled with the position of the first.

    Args:
        width: of the console.
        title: the title of the table.
        first: the position of the first value.
        step: the distance to the next one.
        values: NumPy's values.
        torchs: the same values from torch.
    """
    caption = f"largest difference between NumPy and torch: {np.max(np.abs(values - torchs)):.0e}"
    table = Table.grid(padding=(0, 1, 0, 0))
    table.title, table.caption = title, caption
    table.title_justify = table.caption_justify = "left"
    size = 10 if width >= WIDE else 5
    lines, lines_torch = (_decimals(v.reshape(-1, size)).splitlines() for v in (values, torchs))
    for i, (line, line_torch) in enumerate(zip(lines, lines_torch, strict=True)):
        label, torch_label = ("NumPy ", "torch ") if width >= NARROW else ("", "")
        table.add_row(f"{first + i * size * step:g}", f"{label}{line}")
        table.add_row("", f"{torch_label}{line_torch}", style="cyan")
    return table


def _decimals(values: Array | float) -> str:
    """Two decimals, as the book prints, a line for each row; 0.00 for what rounds to zero from below."""
    rows = np.atleast_2d(np.round(values, 2) + 0.0)
    width = max(5, len(f"{rows.max():.2f}"))
    return "\n".join(" ".join(f"{value:{width}.2f}" for value in row) for row in rows)
