"""The figures of ``torchclip book``: those of the book, and the clipped gradient's beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchclip.cli.figures import Array, steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    """The gradient's norm after each time step, on a linear scale as in the book, and on a log scale.

    On the log scale a norm that is multiplied by the same factor at each step is a straight line.

    Args:
        norms: one norm a step, of shape ``(steps,)``.
        title: what the norms show.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=16)
    for axes, scale in zip(figure.subplots(1, 2), ("linear", "log"), strict=True):
        axes.plot(steps(norms), norms, marker="o", markersize=5)
        axes.set_yscale(scale)
        axes.set_title(f"{scale} scale", fontsize=12)
        axes.set_xlabel("time step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if scale == "log":
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylabel("mean norm of the gradient")
    return figure


def clipped_norms_figure(unclipped: Array, clipped: Array, threshold: float) -> Figure:
    """The norm without clipping against the norm with clipping at each step, on a log scale.

    Args:
        unclipped: one norm a step, of shape ``(steps,)``.
        clipped: the same steps, clipped each time.
        threshold: where clipping sets in, on the scale of the norms; drawn dotted.
    """
    figure, axes = _steps_figure("Exploding Gradients, Clipped at Each Step")
    axes.plot(steps(unclipped), unclipped, marker="o", label="without clipping")
    axes.plot(steps(clipped), clipped, marker="o", label="clipped at each step")
    axes.axhline(threshold, color="black", linestyle=":", label=f"threshold ({threshold:g})")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()
    return figure


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
