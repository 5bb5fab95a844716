"""The picture of ``torchclip train``: loss and gradient norm of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from torchclip.cli.figures import steps
from torchclip.history.figure import on_log_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RunValues = Mapping[str, Sequence[float]]


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
        norm_axes.plot(steps(threshold), threshold, color="black", linestyle="--", label=label)
    norm_axes.legend(fontsize=12)
    return figure


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
