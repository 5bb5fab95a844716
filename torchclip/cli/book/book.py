"""The book's chapter on exploding gradients, run: the command ``torchclip book``.

The subject is sections 6.1.3 and 6.1.4 of *Deep Learning from Scratch 2*: why gradients vanish or explode on
their way back through a recurrent network, and clipping as the remedy for the second.  Each experiment is a
function that returns its numbers, written twice: with the NumPy reference, as in the book, and with torch and
torchclip (``*_torch``).  ``run`` prints both beside each other, with the prose of a short lesson.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.markdown import Markdown
from rich.padding import Padding
from rich.table import Table

import torchclip
from torchclip import reference
from torchclip.history import plots

Array = NDArray[Any]

SEED = 3
BATCH = 2  # N in the book
HIDDEN = 3  # H
STEPS = 20  # T
MAX_NORM = 5.0


# Section 6.1.3: why gradients vanish and explode


def tanh_curve() -> tuple[Array, Array, Array]:
    """The inputs from -5 up to 5 in steps of 0.1, their tanh ``y``, and its derivative ``1 - y**2``."""
    h = np.arange(-5.0, 5.0, 0.1)
    y = np.tanh(h)
    return h, y, 1 - y**2


def tanh_curve_torch() -> tuple[Array, Array, Array]:
    """``tanh_curve`` with the derivative taken by autograd."""
    h = torch.nn.Parameter(torch.arange(-5.0, 5.0, 0.1, dtype=torch.float64))
    y = torch.tanh(h)
    (dy,) = torch.autograd.grad(y.sum(), h)
    return h.detach().numpy(), y.detach().numpy(), dy.numpy()


def recurrent_weights(scale: float) -> Array:
    """``Wh``, of shape ``(HIDDEN, HIDDEN)``: the seed's first draw, standard normal, times ``scale``."""
    return np.random.RandomState(SEED).randn(HIDDEN, HIDDEN) * scale


def gradient_norms(scale: float, max_norm: float = math.inf) -> Array:
    """The mean L2 norm of a gradient after each MatMul on its way back through the time steps.

    Args:
        scale: what the standard normal weights are multiplied by.
        max_norm: the threshold to which the gradient is clipped after every step; by default it is not.

    Returns:
        The norms, divided by the batch size, of shape ``(STEPS,)``.
    """
    weights = recurrent_weights(scale)
    dh = np.ones((BATCH, HIDDEN))
    norms = []
    for _ in range(STEPS):
        dh = dh @ weights.T
        reference.clip_grads([dh], max_norm)
        norms.append(reference.global_norm([dh]) / BATCH)
    return np.array(norms)


def gradient_norms_torch(scale: float, max_norm: float = math.inf) -> Array:
    """``gradient_norms`` on the ``.grad`` of a parameter."""
    weights = torch.from_numpy(recurrent_weights(scale))
    h = torch.nn.Parameter(torch.zeros(BATCH, HIDDEN, dtype=weights.dtype))
    h.grad = torch.ones_like(h)
    norms = []
    for _ in range(STEPS):
        h.grad = h.grad @ weights.T
        torchclip.clip_grad_norm_(h, max_norm)
        norms.append(torchclip.get_total_norm([h.grad]).item() / BATCH)
    return np.array(norms)


# Section 6.1.4: the remedy for exploding gradients


@dataclass(frozen=True)
class WorkedExample:
    """What clipping did to several gradients: their joint norm before and after, and what they became."""

    norm: float
    clipped: list[Array]
    clipped_norm: float

    @property
    def rate(self) -> float:
        """What the gradients were multiplied by."""
        return self.clipped_norm / self.norm


def large_gradients() -> tuple[list[Array], list[Array]]:
    """The gradients of the two worked examples: two 3x3 arrays, then three, uniform in [0, 10).

    They continue the random stream whose first draw is ``recurrent_weights``.
    """
    stream = np.random.RandomState(SEED)
    stream.randn(HIDDEN, HIDDEN)
    two = [stream.rand(3, 3) * 10 for _ in range(2)]
    three = [stream.rand(3, 3) * 10 for _ in range(3)]
    return two, three


def worked_example(grads: Sequence[Array]) -> WorkedExample:
    """Clip copies of ``grads`` to a joint norm of ``MAX_NORM``."""
    clipped = [grad.copy() for grad in grads]
    norm = reference.clip_grads(clipped, MAX_NORM)
    return WorkedExample(norm, clipped, reference.global_norm(clipped))


def worked_example_torch(grads: Sequence[Array]) -> WorkedExample:
    """``worked_example`` on the ``.grad`` of one parameter for each gradient."""
    clipped = [torch.tensor(grad) for grad in grads]
    parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in clipped]
    for parameter, grad in zip(parameters, clipped, strict=True):
        parameter.grad = grad
    norm = torchclip.clip_grad_norm_(parameters, MAX_NORM)
    clipped_norm = torchclip.get_total_norm(clipped)
    return WorkedExample(norm.item(), [grad.numpy() for grad in clipped], clipped_norm.item())


# The lesson


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--figures", metavar="DIR", type=Path, help="also write the four figures there, as PNG"
    )


def run(figures: Path | None) -> None:
    """Print the lesson; with a directory ``figures``, also write its four figures there as PNG.

    Args:
        figures: where the figures go, made if it does not exist; figures of an earlier run are replaced.

    Raises:
        OSError: if the directory cannot be made or written to.
    """
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
    console = Console(width=min(Console().width, 80))
    _explain_tanh(console)
    _explain_matmul(console)
    _explain_clipping(console)
    if figures is not None:
        _draw(console, figures)


def _explain_tanh(console: Console) -> None:
    _say(
        console,
        """
        # Vanishing and exploding gradients

        These are the experiments of *Deep Learning from Scratch 2*, sections 6.1.3 and 6.1.4. Every number is
        computed twice: by NumPy, as in the book, and by torch with torchclip.

        ## 6.1.3 Why gradients vanish or explode

        A recurrent network sends the gradient back through the same layer once for every time step. On each
        of these steps it passes two operations, a tanh and a matrix product. First the **tanh**: with
        `y = tanh(h)`, going back multiplies the gradient by the derivative `dy/dh = 1 - y**2`.
        """,
    )
    _, y, dy = tanh_curve()
    _, y_torch, dy_torch = tanh_curve_torch()
    starts = range(-5, 5)
    _show(console, _series("tanh(h): from each h on, ten values in steps of 0.1", starts, y, y_torch))
    _show(console, _series("dy/dh at the same h; in torch by autograd", starts, dy, dy_torch))
    _say(
        console,
        """
        The derivative is 1 at `h = 0` and smaller everywhere else; beyond 3 on either side next to nothing is
        left of it. A gradient that passes many saturated tanhs is multiplied by almost 0 many times, and what
        arrives says almost nothing about how to lower the loss.
        """,
    )


def _explain_matmul(console: Console) -> None:
    _say(
        console,
        f"""
        Now the **matrix product**. Going back through one time step multiplies the gradient by the recurrent
        weights, `dh = dh @ Wh.T`, and these are the same weights on every step. Take a batch of {BATCH}, a
        hidden state of {HIDDEN}, a gradient of ones and standard normal weights:
        """,
    )
    _show(console, _decimals(recurrent_weights(1.0)))
    _say(console, "The L2 norm of the gradient divided by the batch size, on each of the steps back:")
    exploding = gradient_norms(scale=1.0)
    _show(console, _series("Exploding Gradients", (1, 11), exploding, gradient_norms_torch(scale=1.0)))
    _say(
        console,
        f"""
        The gradient **explodes**. In the end each step multiplies its norm by the same factor, here
        {exploding[-1] / exploding[-2]:.2f}: the largest magnitude among the eigenvalues of `Wh`. Over enough
        steps this passes the largest number that fits into memory. Halve the weights and the factor halves:
        """,
    )
    vanishing = gradient_norms(scale=0.5)
    _show(console, _decimals(recurrent_weights(0.5)))
    _show(console, _series("Vanishing Gradients", (1, 11), vanishing, gradient_norms_torch(scale=0.5)))
    _say(
        console,
        f"""
        At {vanishing[-1] / vanishing[-2]:.2f} it is below 1, and the gradient **vanishes**: a norm of
        {vanishing[-1]:.5f} is left after {STEPS} steps. So the weights decide which of the two happens, and
        hardly any weights keep the balance.

        The book leaves the chain here. One experiment more: the exploding weights again, with the gradient
        clipped to a norm of {MAX_NORM:g} (a mean norm of {MAX_NORM / BATCH:g}) after every step.
        """,
    )
    clipped, clipped_torch = gradient_norms(1.0, MAX_NORM), gradient_norms_torch(1.0, MAX_NORM)
    _show(console, _series("Exploding Gradients, Clipped at Each Step", (1, 11), clipped, clipped_torch))
    _say(
        console,
        """
        The first gradient is small enough and stays as it is; all later ones end on the threshold. Clipping
        cannot help the vanishing gradient, since it never makes anything larger.
        """,
    )


def _explain_clipping(console: Console) -> None:
    two, three = large_gradients()
    _say(
        console,
        f"""
        ## 6.1.4 The remedy for exploding gradients

        In training, gradients are clipped once, after the whole backward pass and before the optimizer's
        step. The gradients of all parameters count as one long vector. If its norm is above the threshold,
        every gradient is multiplied by the same rate:

            rate = max_norm / (norm + 1e-6)
            if rate < 1:
                for grad in grads:
                    grad *= rate

        The step keeps its direction and only gets shorter. (The 1e-6 guards against division by zero.)

        Two gradients of large numbers, and a threshold of {MAX_NORM}:
        """,
    )
    _show(console, _example(two))
    _say(console, "The same with three gradients. They share the one threshold, so each gets less of it:")
    _show(console, _example(three))
    _say(
        console,
        """
        ## In your own training loop

            loss.backward()
            torchclip.clip_grad_norm_(model.parameters(), max_norm=5.0)
            optimizer.step()

        `torchclip train` shows the difference that this line makes to a language model.
        """,
    )


def _example(grads: Sequence[Array]) -> Table:
    """The worked example from top to bottom, NumPy and torch beside each other."""
    sides = [worked_example(grads), worked_example_torch(grads)]
    table = Table("", "NumPy", "torch", box=SIMPLE, show_edge=False)
    for i, grad in enumerate(grads):
        table.add_row(f"dW{i + 1}", _decimals(grad), _decimals(grad))
    table.add_section()
    table.add_row("norm", *(_decimals(side.norm) for side in sides))
    table.add_row("rate", *(_decimals(side.rate) for side in sides))
    table.add_section()
    for i in range(len(grads)):
        table.add_row(f"dW{i + 1}, clipped", *(_decimals(side.clipped[i]) for side in sides))
    table.add_section()
    table.add_row("norm, clipped", *(_decimals(side.clipped_norm) for side in sides))
    return table


def _series(title: str, starts: Iterable[int], values: Array, values_torch: Array) -> Table:
    """Ten values a line, each line of NumPy's above the same of torch's, labelled by where it starts."""
    difference = np.max(np.abs(values - values_torch))
    table = Table(
        box=None,
        show_header=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=title,
        title_justify="left",
        caption=f"largest difference between NumPy and torch: {difference:.0e}",
        caption_justify="left",
    )
    lines, lines_torch = (_decimals(v.reshape(-1, 10)).splitlines() for v in (values, values_torch))
    for start, line, line_torch in zip(starts, lines, lines_torch, strict=True):
        table.add_row(str(start), "NumPy", line)
        table.add_row("", "torch", line_torch, style="cyan")
    return table


def _decimals(values: Array | float) -> str:
    """Two decimals, as the book prints, a line for each row; 0.00 for what rounds to zero from below."""
    rows = np.atleast_2d(np.round(values, 2) + 0.0)
    width = max(5, len(f"{rows.max():.2f}"))
    return "\n".join(" ".join(f"{value:{width}.2f}" for value in row) for row in rows)


def _say(console: Console, text: str) -> None:
    console.print(Markdown(cleandoc(text)), "")


def _show(console: Console, numbers: Table | str) -> None:
    console.print(Padding(numbers, (0, 0, 1, 2)), highlight=False)


def _draw(console: Console, directory: Path) -> None:
    unclipped, vanishing, clipped = gradient_norms(1.0), gradient_norms(0.5), gradient_norms(1.0, MAX_NORM)
    figures = {
        "tanh.png": plots.tanh_figure(*tanh_curve()),
        "exploding.png": plots.gradient_norms_figure(unclipped, "Exploding Gradients"),
        "vanishing.png": plots.gradient_norms_figure(vanishing, "Vanishing Gradients"),
        "clipped.png": plots.clipped_norms_figure(unclipped, clipped, MAX_NORM / BATCH),
    }
    console.print("Figures:")
    for name, figure in figures.items():
        figure.savefig(directory / name)
        console.print(f"  {directory / name}", markup=False, highlight=False, soft_wrap=True)
