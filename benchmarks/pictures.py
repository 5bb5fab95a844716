"""The figures of the page on performance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure, SubFigure
from steps import how
from tables import call_ratio, step_ratio, times

VERMILION, BLUE, GREEN, SKY, GRAY = "C0", "C1", "C2", "C4", "gray"

# torch, with which they are compared, is gray.
CONTENDERS = {
    "torchclip": (BLUE, "o"),
    "kernel off": (SKY, "s"),
    "torch.compile": (VERMILION, "^"),
    "optax": (GREEN, "D"),
}

IN_STEPS = {
    "function, model.parameters()": (SKY, "clip_grad_norm_(model.parameters(), …)"),
    "function, the model": (BLUE, "clip_grad_norm_(model, …)"),
}
"""The bars, with their colors and labels."""


def benchmark_figure(
    rows: Sequence[Mapping[str, Any]],
    operations: Mapping[str, str],
    in_steps: Sequence[Mapping[str, Any]] = (),
) -> Figure:
    """How many times faster than torch each contender is: in a training step, and called by itself.

    Bars show what clipping adds to a step, compared with torch.  Below them are medians with quartiles for
    every workload.  Each panel has its own scale.  Measurements on a busy machine are not drawn.

    Args:
        rows: what ``calls.py`` measured, one workload after another.
        operations: the panels: the name of an operation in the rows, and its title.
        in_steps: what ``steps.py`` measured.
    """
    titles = list(dict.fromkeys(row["title"] for row in rows))
    heights = [1 + 0.5 * len(in_steps)] * bool(in_steps) + [1.2 + 0.7 * len(titles)] * bool(rows)
    figure = Figure((9.5, 1 + sum(heights)), layout="constrained")
    parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if in_steps:
        _steps_panel(parts.pop(0), in_steps)
    if rows:
        _workload_panels(parts.pop(0), rows, operations, titles)
    return figure


def drawn(figure: Figure) -> dict[str, dict[str, dict[str, float]]]:
    """The ratios that ``benchmark_figure`` draws: by the panel's title, the contender, and the row.

    A ratio that is not drawn, as the machine was busy, is missing.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for axes in figure.axes:
        rows = axes.yaxis.get_major_formatter().format_ticks(list(axes.get_yticks()))
        panel = found.setdefault(axes.get_title() or "in a training step", {})
        for marks in axes.containers:
            if isinstance(marks, BarContainer):
                ratios = dict(zip(rows, (bar.get_width() for bar in marks), strict=True))
            else:
                x, y = marks[0].get_data()
                ratios = {rows[int(at)]: float(ratio) for ratio, at in zip(x, y, strict=True)}
            panel[str(marks.get_label())] = {row: ratio for row, ratio in ratios.items() if ratio}
    return found


def _steps_panel(part: SubFigure, rows: Sequence[Mapping[str, Any]]) -> None:
    """Bars: how many times less than torch each contender adds to a step."""
    axes = part.add_subplot()
    height = 0.84 / len(IN_STEPS)
    for i, (name, (color, label)) in enumerate(IN_STEPS.items()):
        ratios = [step_ratio(row, name) for row in rows]
        at = np.arange(len(rows)) + (i - (len(IN_STEPS) - 1) / 2) * height
        bars = axes.barh(at, [ratio or 0 for ratio in ratios], height * 0.9, color=color, label=label)
        axes.bar_label(bars, [times(ratio) for ratio in ratios], padding=3, fontsize=9)
    axes.axvline(1, color=GRAY, linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row['title']}, {how(row)}" for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.01)
    axes.grid(False, axis="y")
    part.suptitle("In a training step: speedup over torch.nn.utils", fontsize=13)
    part.legend(loc="outside lower center", ncols=len(IN_STEPS))


def _workload_panels(
    part: SubFigure, rows: Sequence[Mapping[str, Any]], operations: Mapping[str, str], titles: Sequence[str]
) -> None:
    panels = part.subplots(2, -(-len(operations) // 2), sharey=True, squeeze=False).flat
    for axes, (operation, title) in zip(panels, operations.items(), strict=True):
        results = {row["title"]: row["contenders"] for row in rows if row["operation"] == operation}
        axes.axvline(1, color=GRAY, linewidth=1, label="torch")
        for name, (color, marker) in CONTENDERS.items():
            points = [
                (t, results[t][name]["speedup"])
                for t in titles
                if _measured(results[t], name) and call_ratio(results[t][name]) is not None
            ]
            if not points:
                continue
            low, middle, high = np.array([speedup for _, speedup in points]).reshape(-1, 3).T
            y = [titles.index(t) for t, _ in points]
            spread = (middle - low, high - middle)
            axes.errorbar(middle, y, xerr=spread, color=color, marker=marker, linestyle="", label=name)
        axes.set_title(title, fontsize=12)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.grid(False, axis="y")
    panels[0].set_yticks(range(len(titles)), titles)
    panels[0].invert_yaxis()
    part.suptitle("One call: speedup over torch.nn.utils", fontsize=13)
    pairs = [axes.get_legend_handles_labels() for axes in panels]
    used = {name: handle for handles, names in pairs for handle, name in zip(handles, names, strict=True)}
    part.legend(used.values(), used.keys(), loc="outside lower center", ncols=len(used))


def scaling_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The cost of a gradient as their number grows, and of a byte as one gradient grows: ``clip_grad_norm_``.

    Args:
        rows: what ``calls.py --scaling`` measured.
    """
    figure = Figure((11, 7.5), layout="constrained")
    grid = figure.subplots(2, 2, sharex="row")
    for column, operation in enumerate(("no clipping", "clipping")):
        chosen = [row for row in rows if row["operation"] == operation]
        many, large = (
            [row for row in chosen if (row["tensors"] > 1) == several] for several in (True, False)
        )
        _cost_panel(grid[0, column], many, "tensors", "ns a gradient", f"Gradients of 64, {operation}")
        _cost_panel(grid[1, column], large, "bytes", "ns a byte", f"One gradient, {operation}")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _cost_panel(axes: Axes, rows: Sequence[Mapping[str, Any]], size: str, unit: str, title: str) -> None:
    sizes = np.array([row[size] for row in rows])
    floor = np.array([row["floor_seconds"][1] for row in rows])
    axes.plot(sizes, 1e9 * floor / sizes, color=GRAY, linestyle=":", label="memory traffic alone")
    for name, (color, marker) in {"torch": (GRAY, "."), **CONTENDERS}.items():
        if all(_measured(row["contenders"], name) for row in rows):
            seconds = np.array([row["contenders"][name]["seconds"][1] for row in rows])
            axes.plot(sizes, 1e9 * seconds / sizes, color=color, marker=marker, label=name)
    axes.set(xscale="log", yscale="log", xlabel=size, ylabel=unit, title=title)


def _measured(contenders: Mapping[str, Any], name: str) -> bool:
    return "seconds" in contenders.get(name, {})
