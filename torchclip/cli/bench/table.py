"""The table of ``torchclip bench``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from torchclip.cli.bench.contenders import NAMES, OPERATIONS
from torchclip.cli.bench.timing import Row

__all__ = ["cells", "headers", "present", "show"]


PASSES = {"norm": 1, "no clipping": 1, "clipping": 3, "value": 2}  # over the gradients' bytes, at the least

NARROW = 58  # columns of a terminal from which on the table has the names of the functions
CACHED = 1 << 20  # bytes up to which the memory's bandwidth says nothing


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the results, and what failed."""
    unlimited = console.options.update(width=10_000)  # a measured width is never above the console's
    short = console.width < NARROW
    first, end = 0, len(headers(present(rows)))
    while first < end:  # side by side as many columns as fit, but at least one; the others below
        last = end
        while (
            last > first + 1
            and console.measure(_table(rows, first, last, short), options=unlimited).maximum > console.width
        ):
            last -= 1
        console.print(_table(rows, first, last, short))
        first = last
    for row in rows:
        for name, result in row["contenders"].items():
            if "failed" in result:
                text = f"{name} failed on {row['title']}, {OPERATIONS[row['operation']]}: {result['failed']}"
                console.print(text, markup=False, highlight=False)


def _table(rows: Sequence[Row], first: int, last: int, short: bool) -> Table:
    """Some of the columns.

    Args:
        rows: what was measured.
        first: the first column, from 0.
        last: the one after the last.
        short: whether the names of the functions are left out.
    """
    names = present(rows)
    table = Table(box=SIMPLE, pad_edge=False, show_edge=not short)
    table.add_column(no_wrap=not short, max_width=16 if short else None)
    for header in headers(names)[first:last]:
        table.add_column(header, justify="right", vertical="bottom", no_wrap=True)
    for i, row in enumerate(rows):
        if i % len(OPERATIONS) == 0:
            table.add_row(f"[bold]{row['title']}")
            table.add_row(f"[dim]{row['tensors']:,} tensors, {row['elements']:,} elements")
        name = row["operation"] if short else OPERATIONS[row["operation"]]
        table.add_row(f"  {name}", *cells(row, names)[first:last])
    return table


def present(rows: Sequence[Row]) -> list[str]:
    """The contenders that took part, in the order of the table."""
    return [name for name in NAMES if any(name in row["contenders"] for row in rows)]


def headers(names: Sequence[str]) -> list[str]:
    """What ``cells`` are."""
    return [*names, "torch ÷\ntorchclip", "GB/s", "of\nfloor", "torch:\nerror", "torchclip:\nerror"]


def cells(row: Row, names: Sequence[str]) -> list[str]:
    """One line of the table: medians.  Bandwidth is left out for gradients that fit into a core's cache."""
    results = row["contenders"]
    times = [_time(results.get(name)) for name in names]
    own, bandwidth = results["torchclip"], ["", ""]
    if row["bytes"] > CACHED:
        traffic = PASSES[row["operation"]] * row["bytes"]
        bandwidth = [f"{traffic / own['seconds'][1] / 1e9:.1f}", f"{own['floor_share'][1]:.0%}"]
    errors = [_error(results[name]["norm_error"]) for name in ("torch", "torchclip")]
    return [*times, f"{own['speedup'][1]:.2f}", *bandwidth, *errors]


def _time(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return ""
    if "failed" in result:
        return "failed"
    seconds = result["seconds"][1]
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:,.3g} {unit}"
    return f"{seconds * 1e6:,.3g} µs"


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.0e}"
