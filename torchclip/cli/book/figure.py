"""The figures of ``torchclip book``: the book's own, and one of the clipped gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchclip.cli.figures import GRAY, Array, new_figure, steps, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@style()
def tanh_figure(h: Array, y: Array, dy: Array) -> Figure:
    """The hyperbolic tangent, and its derivative dashed.

    Args:
        h: the inputs, of shape ``(n,)``.
        y: ``tanh(h)``.
        dy: the derivative at ``h``.
    """
    figure = new_figure(8, 5)
    axes = figure.add_subplot(xlabel="h", ylabel="y")
    axes.set_title("tanh and its derivative", fontsize=16)
    axes.plot(h, y, label="tanh(h)")
    axes.plot(h, dy, linestyle="--", label="dy/dh")
    axes.legend()
    return figure


@style()
def gradient_norms_figure(norms: Array, title: str) -> Figure:
    """The gradient's norm after each time step, on a linear scale as in the book, and on a log scale.

    On the log scale a norm that is multiplied by the same factor at each step is a straight line.

    Args:
        norms: one norm a step, of shape ``(steps,)``.
        title: what the norms show.
    """
    figure = new_figure(8, 5)
    figure.suptitle(title, fontsize=16)
    for axes, scale in zip(figure.subplots(1, 2), ("linear", "log"), strict=True):
        axes.plot(steps(norms), norms, marker="o", markersize=5)
        axes.set_title(f"{scale} scale", fontsize=12)
        _label_steps(axes, scale)
    return figure


@style()
def clipped_norms_figure(unclipped: Array, clipped: Array, threshold: float) -> Figure:
    """The norm without clipping against the norm with clipping at each step, on a log scale.

    Args:
        unclipped: one norm a step, of shape ``(steps,)``.
        clipped: the same steps, clipped each time.
        threshold: above it gradients are clipped, on the scale of the norms; drawn dotted.
    """
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    axes.set_title("Exploding gradients, clipped at each step", fontsize=16)
    axes.plot(steps(unclipped), unclipped, marker="o", label="without clipping")
    axes.plot(steps(clipped), clipped, marker="o", label="clipped at each step")
    axes.axhline(threshold, color=GRAY, linestyle=":", label=f"threshold ({threshold:g})")
    _label_steps(axes, "log")
    axes.legend()
    return figure


def _label_steps(axes: Axes, scale: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="time step", ylabel="mean norm of the gradient", yscale=scale)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if scale == "log":
        axes.yaxis.set_major_formatter("{x:g}")
