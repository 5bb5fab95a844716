"""The figures of ``torchclip bench``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


# Of the same palette; torch is what they are compared with, and black.
CONTENDERS = {
    "torchclip": ("#0072B2", "o"),
    "kernel off": ("#56B4E9", "s"),
    "torch.compile": ("#D55E00", "^"),
    "optax": ("#009E73", "D"),
}

IN_STEPS = {
    "function, model.parameters()": ("#56B4E9", "clip_grad_norm_(model.parameters(), …)"),
    "function, the model": ("#0072B2", "clip_grad_norm_(model, …)"),
    "Clipper": ("#009E73", "Clipper"),
}
"""The bars, with their colours and labels."""


def benchmark_figure(
    rows: Sequence[Mapping[str, Any]],
    operations: Mapping[str, str],
    in_steps: Sequence[Mapping[str, Any]] = (),
) -> Figure:
    """How many times faster than torch each contender is: inside of a training step, and by itself.

    Above are bars, what clipping adds to a step compared with torch's; below, on every workload, medians with
    their quartiles.  Each panel has a scale of its own.

    Args:
        rows: what ``torchclip bench`` measured, one workload after another.
        operations: the panels: what the rows call an operation, and its title.
        in_steps: what ``torchclip bench`` measured inside of training steps.
    """
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(row["title"] for row in rows))
    heights = [0.6 + 0.42 * len(in_steps)] * bool(in_steps) + [1.2 + 0.45 * len(titles)] * bool(rows)
    figure = Figure(figsize=(13, 1 + sum(heights)), dpi=120, layout="constrained")
    parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if in_steps:
        _steps_panel(parts.pop(0).add_subplot(), in_steps)
    if rows:
        _workload_panels(parts.pop(0), rows, operations, titles)
    return figure


def _steps_panel(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Bars: how many times less than torch's each contender adds to a step."""
    labels = [f"{row['title']}, {row['optimizer']}, {'clipping' if row['clips'] else 'idle'}" for row in rows]
    height = 0.8 / len(IN_STEPS)
    for i, (name, (colour, label)) in enumerate(IN_STEPS.items()):
        speedups = [row["speedup"][name][0] for row in rows]
        at = np.arange(len(rows)) + (i - (len(IN_STEPS) - 1) / 2) * height
        bars = axes.barh(at, speedups, height, color=colour, label=label)
        axes.bar_label(bars, [f"{speedup:.1f}×" for speedup in speedups], padding=3, fontsize=9)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_title("inside of a training step: what torch adds, divided by what is added by", fontsize=12)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _workload_panels(
    part: SubFigure, rows: Sequence[Mapping[str, Any]], operations: Mapping[str, str], titles: Sequence[str]
) -> None:
    panels = part.subplots(1, len(operations), sharey=True, squeeze=False)[0]
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
        axes.xaxis.set_minor_formatter("")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(titles)), titles)
    panels[0].invert_yaxis()
    part.supxlabel("the call by itself, again and again: times faster than torch.nn.utils", fontsize=12)
    used = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    part.legend(used.values(), used.keys(), loc="outside upper center", ncols=len(used), frameon=False)


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
