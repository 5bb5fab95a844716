"""The picture of ``torchclip train``: loss and gradient norm of its runs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from torchclip.cli.figures import BLUE, GRAY, VERMILION, Array, new_figure, steps, style
from torchclip.history.figure import on_log_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Columns = Mapping[str, Sequence[float]]

RUNS = {"unclipped": ("without clipping", VERMILION), "clipped": ("with clipping", BLUE)}
"""The names of the runs in the legend, where "clipped" also says what happened to a step."""


@style()
def training_figure(runs: Mapping[str, Columns], note: str = "") -> Figure:
    """Loss and gradient norm of training runs, side by side, on log scales.

    The steps at which the run ``"clipped"`` was clipped are marked.  The threshold of the last run is dashed,
    with a gap where it is infinite.

    Args:
        runs: what ``torchclip.history.History.as_dict`` returns, with losses, for ``"unclipped"``,
            ``"clipped"`` or both; losses and norms that are not finite leave a gap.
        note: why the threshold changes, for the legend.
    """
    figure = new_figure(10, 4.6)
    loss_axes, norm_axes = figure.subplots(1, 2)
    _draw_runs(loss_axes, "Loss", runs, "loss")
    _draw_runs(norm_axes, "Gradient norm before clipping", runs, "total_norm")
    if "clipped" in runs and any(is_clipped := runs["clipped"]["clipped"]):
        label = f"clipped ({sum(is_clipped):,} of {len(is_clipped):,} steps)"
        at = np.flatnonzero(is_clipped)
        norms = on_log_scale(runs["clipped"]["total_norm"])
        norm_axes.plot(at + 1, norms[at], "o", color=BLUE, markersize=3, label=label)
    threshold = on_log_scale([*runs.values()][-1]["max_norm"])
    if np.isfinite(threshold).any():
        label = textwrap.fill(_threshold_label(threshold, note), 58)
        norm_axes.plot(steps(threshold), threshold, color=GRAY, linestyle="--", label=label)
    handles, labels = norm_axes.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=11, loc="outside lower center", ncols=2)
    return figure


def _threshold_label(threshold: Array, note: str) -> str:
    """The threshold, or why it changes, begins late or has gaps."""
    if (threshold == threshold[0]).all():
        return f"threshold {threshold[0]:g}"
    first = int(np.flatnonzero(np.isfinite(threshold))[0])
    late = f"from step {first + 1} on, after learning from earlier steps" if first else ""
    reasons = "; ".join(filter(None, (late, note)))
    return f"threshold ({reasons})" if reasons else "threshold"


def _draw_runs(axes: Axes, title: str, runs: Mapping[str, Columns], column: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for name, columns in runs.items():
        label, colour = RUNS[name]
        values = on_log_scale(columns[column])
        axes.plot(steps(values), values, color=colour, linewidth=1.4, label=label)
    axes.set_title(title, size=15, loc="left")
    axes.set_xlabel("training step", size=13)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(labelsize=12)
