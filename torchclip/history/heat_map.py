"""The norms and updates of single parameters as heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from torchclip.history.figure import label_plainly
from torchclip.history.layers import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 9.0
_MOST_LABELS = 45  # as many can be read next to each other
_MOST_LETTERS = 40
_RED = "#e41a1c"


def heat_maps(names: Sequence[str], steps: Sequence[int], norms: Array, ratios: Array | None) -> Figure:
    """A heat map: parameters from top to bottom in the order of the model, steps from left to right.

    Args:
        names: the names of the parameters.
        steps: the numbers of the steps.
        norms: the norms, of shape ``(steps, parameters)``. Values that a log scale cannot show are gray (0)
            or red (not finite).
        ratios: the updates divided by the weights, of the same shape, for a second heat map below; None for
            none.
    """
    from matplotlib.figure import Figure

    height = min(max(0.2 * len(names) + 1.5, 3.5), 2 + _WIDTH)
    maps = [("Norm of each parameter's gradient before clipping", "norm", norms)]
    if ratios is not None:
        maps.append(("Update of each parameter, divided by its norm", "update / weight", ratios))
    figure = Figure(figsize=(_WIDTH, height * len(maps)), dpi=120, layout="constrained")
    for i, (title, label, values) in enumerate(maps):
        axes = figure.add_subplot(len(maps), 1, i + 1, xlabel="step")
        axes.set_title(title, fontsize=13, loc="left")
        if (np.isfinite(values) & (values > 0)).any():
            _draw(axes, steps, values, label)
            _label_parameters(axes, names)
        else:
            axes.text(0.5, 0.5, "no norms to show", ha="center", va="center", transform=axes.transAxes)
            axes.set(xticks=[], yticks=[])
    return figure


def _draw(axes: Axes, steps: Sequence[int], values: Array, label: str) -> None:
    """Draw the cells, each from its step to the next one, with a color bar."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    is_finite = np.isfinite(values)
    shown = values[is_finite & (values > 0)]
    low, high = shown.min(), max(shown.max(), 1.1 * shown.min())
    # As many colors as an eye can distinguish: stored as pixels they take less space than 256.
    colors = colormaps["viridis"].resampled(64).with_extremes(over=_RED)
    cells = np.ma.masked_equal(np.where(is_finite, values, 10 * high), 0.0).T
    edges = [*steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)]
    rows = np.arange(values.shape[1] + 1) - 0.5
    axes.set_facecolor("#d9d9d9")  # where there is nothing to draw
    mesh = axes.pcolormesh(edges, rows, cells, norm=LogNorm(low, high), cmap=colors)
    bar = axes.figure.colorbar(mesh, ax=axes, label=label, pad=0.02, fraction=0.05, aspect=30)
    label_plainly(bar.ax.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(rows[-1], rows[0])
    # A single step is narrow, so that a mark above it shows where to look.
    at = np.asarray(steps)[~is_finite.all(axis=1)]
    if len(at):
        axes.plot(
            at,
            np.full(len(at), 1.0),
            "v",
            color=_RED,
            clip_on=False,
            transform=axes.get_xaxis_transform(),
            label=f"not finite ({len(at):,} of {len(steps):,} steps)",
        )
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=9, borderaxespad=0.1)


def _label_parameters(axes: Axes, names: Sequence[str]) -> None:
    """Label the rows; of many, only every few, so that the labels can be read."""
    at = range(0, len(names), -(-len(names) // _MOST_LABELS))
    axes.set_yticks([*at], [_shortened(names[i]) for i in at])
    axes.tick_params(axis="y", labelsize=8, length=2)


def _shortened(name: str) -> str:
    """A long name without its middle, as names differ at their ends."""
    start = _MOST_LETTERS // 3
    if len(name) <= _MOST_LETTERS:
        return name
    return f"{name[:start].rstrip('.')}…{name[start + 1 - _MOST_LETTERS :].lstrip('.')}"
