"""The figures of a history: from data to a matplotlib figure, which the caller saves.

Figures are made as objects, without ``pyplot``, so there is no window and no global state.  matplotlib comes
with the ``demo`` extra and is imported when a figure is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Array = NDArray[Any]

_WIDTH = 8.0


def history_figure(histories: Mapping[str, Mapping[str, Sequence[Any]]]) -> Figure:
    """The norm over the steps on a log scale, with the threshold; steps that were clipped are marked.

    A norm that a log scale cannot show (0, inf, nan) leaves a gap.  Steps that were not finite or were
    skipped are marked at the upper edge.

    Args:
        histories: what ``torchclip.history.History.as_dict`` returns, by title, to be drawn one below the
            other; those without steps are left out.
    """
    histories = {title: columns for title, columns in histories.items() if columns["step"]}
    if not histories:
        return _empty_figure("no step has been recorded")
    heights = [7.5 if len(losses_of(columns)) else 5.0 for columns in histories.values()]
    figure = _figure(sum(heights))
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights) if len(heights) > 1 else [figure]
    for part, (title, columns) in zip(parts, histories.items(), strict=True):
        if len(losses_of(columns)):
            axes, below = part.subplots(2, 1, sharex=True, height_ratios=(2, 1))
            _draw_loss(below, columns)
            axes.xaxis.label.set_visible(False)
        else:
            axes = part.add_subplot()
        _draw_norms(axes, columns)
        axes.set_title(title)
        part.legend(loc="outside lower center", ncols=5)
    return figure


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), dpi=120, layout="constrained")


def _empty_figure(text: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure = _figure(2)
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=14)
    return figure


def losses_of(columns: Mapping[str, Sequence[float | None]]) -> Array:
    """The loss of each step, ``nan`` where it is not known; empty if no loss is known."""
    losses = np.array([np.nan if loss is None else loss for loss in columns["loss"]], dtype=np.float64)
    return losses if not np.isnan(losses).all() else losses[:0]


def _draw_loss(axes: Axes, columns: Mapping[str, Sequence[float]]) -> None:
    """Draw the known losses of a history's columns over the steps; those that are not finite leave gaps."""
    losses = losses_of(columns)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    shown = np.where(np.isfinite(losses), losses, np.nan)
    axes.plot(columns["step"], shown, color="tab:green", linewidth=0.8, label="loss")
    known = shown[np.isfinite(shown)]
    if len(known) and known.min() > 0 and known.max() > 20 * known.min():
        axes.set_yscale("log")
        label_plainly(axes.yaxis)


def _draw_norms(axes: Axes, columns: Mapping[str, Sequence[float]]) -> None:
    """Draw the norms and marks of ``history_figure``, with labels for a legend."""
    step = np.asarray(columns["step"])
    norm, threshold = on_log_scale(columns["total_norm"]), on_log_scale(columns["max_norm"])
    clipped, nonfinite, skipped = (
        np.asarray(columns[name], dtype=bool) for name in ("clipped", "nonfinite", "skipped")
    )
    axes.set(xlabel="step", ylabel="gradient norm before clipping")
    axes.grid(alpha=0.3)
    axes.plot(step, norm, color="tab:blue", linewidth=0.8, marker=".", markersize=2, label="norm")
    label = f"clipped ({clipped.sum():,})"
    size = 4 if len(step) <= 1000 else 2
    if clipped.any():
        axes.plot(step[clipped], norm[clipped], "o", color="tab:orange", markersize=size, label=label)
    if np.isfinite(threshold).any():
        axes.plot(step, threshold, color="gray", linewidth=1.2, label="threshold")
    edge = axes.get_xaxis_transform()  # y from 0 to 1, for any scale
    for mask, name, marker, y in [(nonfinite, "non-finite", "v", 0.98), (skipped, "skipped", "x", 0.94)]:
        if mask.any():
            label, heights = f"{name} ({mask.sum():,})", np.full(mask.sum(), y)
            axes.plot(step[mask], heights, marker, color="tab:red", transform=edge, label=label)
    if np.isfinite([*norm, *threshold]).any():  # a log scale must have something to show
        axes.set_yscale("log")
        label_plainly(axes.yaxis)


def histogram_figure(norms: Sequence[float], max_norms: Sequence[float], suggested: float | None) -> Figure:
    """A histogram of the norms on a log scale, with the median threshold, and a suggested one.

    Norms that are not finite or 0 are not shown.
    """
    figure = _figure(3.5)
    axes = figure.add_subplot(xlabel="gradient norm before clipping", ylabel="steps")
    axes.grid(axis="y", alpha=0.3)
    shown = on_log_scale(norms)
    shown = shown[np.isfinite(shown)]
    if len(shown):
        # At least a small width, if all norms are equal.
        low, high = shown.min() / 1.05, shown.max() * 1.05
        bins = int(np.clip(np.sqrt(len(shown)), 10, 60))
        axes.hist(shown, np.geomspace(low, high, bins + 1).tolist(), color="tab:blue")
        axes.set_xscale("log")
        label_plainly(axes.xaxis)
    thresholds = on_log_scale(max_norms)
    thresholds = thresholds[np.isfinite(thresholds)]
    if len(thresholds):
        middle = float(np.median(thresholds))
        name = "threshold" if (thresholds == middle).all() else "median threshold"
        axes.axvline(middle, color="gray", linewidth=1.2, label=f"{name} ({middle:.3g})")
    if suggested is not None:
        axes.axvline(suggested, color="tab:orange", linestyle="--", label=f"suggested ({suggested:g})")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper right", ncols=2)
    return figure


def label_plainly(axis: Axis) -> None:
    """Label a log scale with numbers such as 0.3, where matplotlib writes 3·10⁻¹."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain())


def on_log_scale(values: Sequence[float]) -> Array:
    """Replace values that a log scale cannot show by NaN, which leaves a gap in a line."""
    numbers = np.asarray(values, dtype=np.float64)
    return np.where((numbers > 0) & np.isfinite(numbers), numbers, np.nan)


def losses_figure(losses: Mapping[str, Sequence[float]]) -> Figure:
    """The losses of several runs over the steps, by the name of the run, smoothed if there are many."""
    if not losses:
        return _empty_figure("no loss was seen")
    figure = _figure(5)
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    for name, of_run in losses.items():
        axes.plot(_smooth(of_run), linewidth=1.2, label=name)
    known = [loss for of_run in losses.values() for loss in of_run if math.isfinite(loss)]
    if known and min(known) > 0 and max(known) > 5 * min(known):
        axes.set_yscale("log")
        label_plainly(axes.yaxis)
    axes.set_title("Loss of each run", fontsize=16)
    figure.legend(loc="outside lower center", ncols=6, title="threshold")
    return figure


def _smooth(losses: Sequence[float]) -> Array:
    """The moving mean over a fiftieth of the run; values that are not finite leave gaps."""
    values = np.where(np.isfinite(losses), losses, np.nan)
    width = max(len(values) // 50, 1)
    if np.isnan(values).any():
        return values
    head = np.cumsum(values[: width - 1]) / np.arange(1, width)
    return np.concatenate([head, np.convolve(values, np.full(width, 1 / width), "valid")])
