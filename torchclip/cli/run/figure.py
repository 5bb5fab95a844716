"""The figure of ``torchclip run``: the steps of each optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torchclip.history.figure import draw_loss, draw_norms, empty_figure, losses_of
from torchclip.history.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["histories_figure"]


def histories_figure(histories: Mapping[str, History]) -> Figure:
    """The norm over the steps, and below it the loss if it is known, in panels for each optimizer.

    Args:
        histories: the steps, by their title; may be empty.
    """
    from matplotlib.figure import Figure

    columns = {label: history.as_dict() for label, history in histories.items() if len(history)}
    if not columns:
        return empty_figure("no optimizer took a step")
    panels = [(label, name) for label in columns for name in _panels(columns[label])]
    ratios = [2 if name == "norm" else 1 for _, name in panels]
    figure = Figure(figsize=(8, 1 + 2 * sum(ratios)), dpi=120, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for (label, name), each, above in zip(panels, axes, [None, *axes], strict=False):
        if name == "loss":
            draw_loss(each, columns[label])
            each.sharex(above)
            continue
        draw_norms(each, columns[label])
        each.set_title(label, fontsize=14)
        each.legend(loc="upper left", bbox_to_anchor=(0, -0.13), ncols=5, frameon=False)
    return figure


def _panels(columns: Mapping[str, list[float]]) -> list[str]:
    return ["norm", "loss"] if len(losses_of(columns)) else ["norm"]
