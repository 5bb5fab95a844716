"""The picture of ``torchclip train``: loss and gradient norm of its runs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from torchclip.cli.figures import Array, steps
from torchclip.history.figure import on_log_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RunValues = Mapping[str, Sequence[float]]


# Vermilion and blue of Okabe and Ito's palette, which colour-blind readers can tell apart.
RUN_COLOURS = {"unclipped": "#D55E00", "clipped": "#0072B2"}


def training_figure(
    losses: RunValues,
    norms: RunValues,
    max_norms: Sequence[float],
    clipped: Sequence[bool] = (),
    note: str = "",
) -> Figure:
    """Loss and gradient norm of training runs, beside each other, on log scales.

    Args:
        losses: for the runs ``"unclipped"``, ``"clipped"`` or both, one loss a step; where it is
            not finite there is a gap.
        norms: likewise the norms before clipping.
        max_norms: the threshold of the last run at each step, drawn dashed, with a gap where it is infinite.
        clipped: whether the last run was clipped at each step; these steps are marked.
        note: what else the legend says about the threshold.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), dpi=140, layout="constrained")
    loss_axes, norm_axes = figure.subplots(1, 2)
    _draw_runs(loss_axes, "Loss", losses)
    _draw_runs(norm_axes, "Gradient norm before clipping", norms)
    *_, last = norms.values()
    is_clipped = np.asarray(clipped, dtype=bool)
    if is_clipped.any():
        label = f"clipped ({is_clipped.sum():,} of {len(is_clipped):,} steps)"
        at = np.flatnonzero(is_clipped)
        colour = RUN_COLOURS["clipped"]
        norm_axes.plot(at + 1, on_log_scale(last)[at], "o", color=colour, markersize=3, label=label)
    threshold = on_log_scale(max_norms)
    if np.isfinite(threshold).any():
        label = textwrap.fill(_threshold_label(threshold, note), 58)
        norm_axes.plot(steps(threshold), threshold, color="black", linestyle="--", label=label)
    handles, labels = norm_axes.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=11, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _threshold_label(threshold: Array, note: str) -> str:
    """What the threshold is, or why it changes, begins late or has gaps."""
    if (threshold == threshold[0]).all():
        return f"threshold {threshold[0]:g}"
    first = int(np.flatnonzero(np.isfinite(threshold))[0])
    late = f"from step {first + 1} on, after learning from those before" if first else ""
    reasons = "; ".join(filter(None, (late, note)))
    return f"threshold ({reasons})" if reasons else "threshold"


def _draw_runs(axes: Axes, title: str, runs: RunValues) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for name, values in runs.items():
        numbers = on_log_scale(values)
        axes.plot(steps(numbers), numbers, color=RUN_COLOURS[name], linewidth=1.4, label=name)
    axes.set_title(title, size=15, loc="left")
    axes.set_xlabel("training step", size=13)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(labelsize=12)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
