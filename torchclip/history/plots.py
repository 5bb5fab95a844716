"""The figures of the commands: data in, a matplotlib figure out, which the caller saves.

Figures are made as objects, without ``pyplot``: no window, no global state, nothing to close.  matplotlib
comes with the ``demo`` extra and is imported where a figure is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from torchclip.history.figure import on_log_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[Any]
RunValues = Mapping[str, Sequence[float]]


def tanh_figure(h: Array, y: Array, dy: Array) -> Figure:
    """The hyperbolic tangent, and its derivative dashed.

    Args:
        h: the inputs, of shape ``(n,)``.
        y: ``tanh(h)``.
        dy: the derivative at ``h``.
    """
    figure, axes = _book_figure("tanh and its derivative", x="h", y="y")
    axes.plot(h, y, label="tanh(h)")
    axes.plot(h, dy, linestyle="--", label="dy/dh")
    axes.legend()
    return figure


def gradient_norms_figure(norms: Array, title: str) -> Figure:
    """The gradient's norm after each time step, on a linear scale.

    Args:
        norms: one norm a step, of shape ``(steps,)``.
        title: what the norms show.
    """
    figure, axes = _steps_figure(title)
    axes.plot(_steps(norms), norms, marker="o")
    return figure


def clipped_norms_figure(unclipped: Array, clipped: Array, threshold: float) -> Figure:
    """The norm without clipping against the norm with clipping at each step, on a log scale.

    Args:
        unclipped: one norm a step, of shape ``(steps,)``.
        clipped: the same steps, clipped each time.
        threshold: where clipping sets in, on the scale of the norms; drawn dotted.
    """
    figure, axes = _steps_figure("Exploding Gradients, Clipped at Each Step")
    axes.plot(_steps(unclipped), unclipped, marker="o", label="without clipping")
    axes.plot(_steps(clipped), clipped, marker="o", label="clipped at each step")
    axes.axhline(threshold, color="black", linestyle=":", label=f"threshold ({threshold:g})")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()
    return figure


# Vermilion and blue of Okabe and Ito's palette, which colour-blind readers can tell apart.
RUN_COLOURS = {"unclipped": "#D55E00", "clipped": "#0072B2"}


def training_figure(losses: RunValues, norms: RunValues, max_norms: Sequence[float]) -> Figure:
    """Loss and gradient norm of training runs, beside each other, on log scales.

    Args:
        losses: for the runs ``"unclipped"``, ``"clipped"`` or both, one loss a step; where it is
            not finite there is a gap.
        norms: likewise the norms before clipping.
        max_norms: the threshold of the last run at each step, drawn dashed, with a gap where it is infinite.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=140, layout="constrained")
    loss_axes, norm_axes = figure.subplots(1, 2)
    _draw_runs(loss_axes, "Loss", losses)
    _draw_runs(norm_axes, "Gradient norm before clipping", norms)
    threshold = on_log_scale(max_norms)
    if np.isfinite(threshold).any():
        label = f"threshold {threshold[0]:g}" if (threshold == threshold[0]).all() else "threshold"
        norm_axes.plot(_steps(threshold), threshold, color="black", linestyle="--", label=label)
    norm_axes.legend(fontsize=12)
    return figure


def _draw_runs(axes: Axes, title: str, runs: RunValues) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for name, values in runs.items():
        numbers = on_log_scale(values)
        axes.plot(_steps(numbers), numbers, color=RUN_COLOURS[name], linewidth=1.4, label=name)
    axes.set_title(title, size=15, loc="left")
    axes.set_xlabel("training step", size=13)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(labelsize=12)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


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


def _book_figure(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize=16)
    axes.grid(alpha=0.3)
    return figure, axes


def _steps_figure(title: str) -> tuple[Figure, Axes]:
    from matplotlib.ticker import MaxNLocator

    figure, axes = _book_figure(title, x="time step", y="mean norm of the gradient")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _steps(norms: Array) -> range:
    """Time steps as the book counts them, from 1."""
    return range(1, len(norms) + 1)
