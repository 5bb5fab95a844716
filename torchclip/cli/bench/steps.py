"""What clipping adds to a training step: the rows of ``torchclip bench``, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from torchclip.cli.bench import loop
from torchclip.cli.bench.timing import progress

__all__ = ["COLUMNS", "measure_steps", "show_steps"]

TITLES = {"mlp": "MLP 17-64-64-6", "layers": "24 layers of 32"}
TORCH = "torch, model.parameters()"
COLUMNS = {
    TORCH: "torch",
    "function, model.parameters()": "function",
    "function, the model": "function,\nmodel",
    "Clipper": "Clipper",
}
"""Who is in the table, the line that most people write first."""
WIDE, NARROW = 76, 58  # columns of a terminal from which on the table has all of its parts

StepRow = dict[str, Any]


def measure_steps(rounds: int) -> list[StepRow]:
    """What each contender adds to a step, in seconds, and how many times less than torch's that is.

    Args:
        rounds: how often each contender takes its turn.
    """
    rows = [
        loop.Row(model, optimizer, clips)
        for model in loop.MODELS
        for optimizer in loop.OPTIMIZERS
        for clips in (False, True)
    ]
    found = []
    with progress(len(rows)) as begin:
        for row in rows:
            begin(f"{TITLES[row.model]}, {row.optimizer}: {_what(row.clips)}")
            added = loop.added(loop.measure(row, rounds=rounds))
            speedups = loop.speedups(added)
            found.append(
                {
                    "model": row.model,
                    "title": TITLES[row.model],
                    "optimizer": row.optimizer,
                    "clips": row.clips,
                    "added": {name: list(each) for name, each in added.items()},
                    "speedup": {name: list(each) for name, each in speedups.items()},
                }
            )
    return found


def show_steps(rows: Sequence[StepRow], console: Console) -> None:
    """Print what clipping adds to a step; on little width only how it compares with torch's."""
    heading, columns = "µs that clipping adds to a step", COLUMNS
    if console.width < WIDE:
        columns = {name: title for name, title in COLUMNS.items() if "the model" not in name}
    if console.width < NARROW:
        heading = "torch's time\ndivided by"
        columns = {name: title for name, title in columns.items() if name != TORCH}
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0), show_edge=console.width >= NARROW)
    table.add_column(heading, vertical="bottom", min_width=21)
    for title in columns.values():
        table.add_column(title, justify="right", vertical="bottom", no_wrap=True)
    for i, row in enumerate(rows):
        if i == 0 or row["model"] != rows[i - 1]["model"]:
            table.add_row(f"[bold]{row['title']}")
        cells = [_cell(row, name, console.width >= NARROW) for name in columns]
        table.add_row(f"{row['optimizer']}, {_what(row['clips'])}", *cells)
    console.print(table)
    doubt = max(abs(row["added"]["no clipping once more"][0]) for row in rows)
    brackets = "; in brackets torch's divided by it" if console.width >= NARROW else ""
    console.print(
        f"Lower quartiles, on one thread{brackets}. Two measurements of a step without clipping differ by up "
        f"to {1e6 * doubt:.1f} µs.",
        style="dim",
        highlight=False,
    )


def _what(clips: bool) -> str:
    return "clipping" if clips else "idle"


def _cell(row: Mapping[str, Any], name: str, whole: bool) -> str:
    text = f"{1e6 * row['added'][name][0]:.1f}"
    if name not in row["speedup"]:
        return text
    speedup = f"{row['speedup'][name][0]:.1f}×"
    return f"{text} ({speedup})" if whole else speedup
