"""The figures of ``torchclip bench``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Of the same palette; torch is what they are compared with, and black.
CONTENDERS = {
    "torchclip": ("#0072B2", "o"),
    "kernel off": ("#56B4E9", "s"),
    "torch.compile": ("#D55E00", "^"),
    "optax": ("#009E73", "D"),
}


def benchmark_figure(rows: Sequence[Mapping[str, Any]], operations: Mapping[str, str]) -> Figure:
    """How many times faster than torch each contender is, on every workload: medians with their quartiles.

    Args:
        rows: what ``torchclip bench`` measured, one workload after another.
        operations: the panels: what the rows call an operation, and its title.
    """
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(row["title"] for row in rows))
    figure = Figure(figsize=(13, 2.2 + 0.45 * len(titles)), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(operations), sharey=True, squeeze=False)[0]
    for axes, (operation, title) in zip(panels, operations.items(), strict=True):
        results = {row["title"]: row["contenders"] for row in rows if row["operation"] == operation}
        axes.axvline(1, color="black", linewidth=1, label="torch")
        for name, (colour, marker) in CONTENDERS.items():
            points = [(t, results[t][name]["speedup"]) for t in titles if _measured(results[t], name)]
            if not points:
                continue
            low, middle, high = np.array([speedup for _, speedup in points]).reshape(-1, 3).T
            y = [titles.index(t) for t, _ in points]
            spread = (middle - low, high - middle)
            axes.errorbar(middle, y, xerr=spread, color=colour, marker=marker, linestyle="", label=name)
        axes.set_title(title, fontsize=12)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(titles)), titles)
    panels[0].invert_yaxis()
    figure.supxlabel("times faster than torch.nn.utils", fontsize=12)
    used = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(used.values(), used.keys(), loc="outside upper center", ncols=len(used))
    return figure


def scaling_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What a gradient costs as there are more of them, and a byte as one gradient grows: ``clip_grad_norm_``.

    Args:
        rows: what ``torchclip bench --scaling`` measured.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), dpi=120, layout="constrained")
    grid = figure.subplots(2, 2, sharex="row")
    for column, operation in enumerate(("no clipping", "clipping")):
        chosen = [row for row in rows if row["operation"] == operation]
        many, large = (
            [row for row in chosen if (row["tensors"] > 1) == several] for several in (True, False)
        )
        _cost_panel(grid[0, column], many, "tensors", "ns a gradient", f"gradients of 64, {operation}")
        _cost_panel(grid[1, column], large, "bytes", "ns a byte", f"one gradient, {operation}")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _cost_panel(axes: Axes, rows: Sequence[Mapping[str, Any]], size: str, unit: str, title: str) -> None:
    sizes = np.array([row[size] for row in rows])
    floor = np.array([row["floor_seconds"][1] for row in rows])
    axes.plot(sizes, 1e9 * floor / sizes, color="gray", linestyle=":", label="memory traffic alone")
    for name, (colour, marker) in {"torch": ("black", "."), **CONTENDERS}.items():
        if all(_measured(row["contenders"], name) for row in rows):
            seconds = np.array([row["contenders"][name]["seconds"][1] for row in rows])
            axes.plot(sizes, 1e9 * seconds / sizes, color=colour, marker=marker, label=name)
    axes.set(xscale="log", yscale="log", xlabel=size, ylabel=unit, title=title)
    axes.grid(alpha=0.3)


def _measured(contenders: Mapping[str, Any], name: str) -> bool:
    return "seconds" in contenders.get(name, {})
