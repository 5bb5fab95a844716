"""The figure of ``torchclip run``: the steps of each optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torchclip.history.figure import draw_norms
from torchclip.history.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["histories_figure"]


def histories_figure(histories: Mapping[str, History]) -> Figure:
    """The norm over the steps, a panel for each optimizer.

    Args:
        histories: the steps, by what to write above them; may be empty.
    """
    from matplotlib.figure import Figure

    panels = len(histories)
    figure = Figure(figsize=(8, 1 + 4 * max(panels, 1)), dpi=120, layout="constrained")
    if not panels:
        figure.text(0.5, 0.5, "no optimizer took a step", ha="center", fontsize=14)
        return figure
    for axes, (label, history) in zip(
        figure.subplots(panels, 1, squeeze=False)[:, 0], histories.items(), strict=True
    ):
        draw_norms(axes, history.as_dict())
        axes.set_title(label, fontsize=14)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.13), ncols=5, frameon=False)
    return figure
