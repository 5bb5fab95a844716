"""The prose of the book's chapter, and its numbers by NumPy and by torch side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from inspect import cleandoc
from typing import NamedTuple

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.markdown import Markdown
from rich.padding import Padding
from rich.table import Table

from torchclip.cli.book.experiments import (
    BATCH,
    HIDDEN,
    MAX_NORM,
    STEPS,
    gradient_norms,
    gradient_norms_torch,
    large_gradients,
    recurrent_weights,
    tanh_curve,
    tanh_curve_torch,
    worked_example,
    worked_example_torch,
)
from torchclip.cli.figures import Array

# Columns of a terminal from which on a table has all its parts.
WIDE, MEDIUM, NARROW = 78, 58, 45


class Numbers(NamedTuple):
    """A part of the lesson that is not prose: a table, which depends on the width, or lines."""

    show: Callable[[int], Table | str]


Parts = Iterator["str | Numbers"]


def tanh() -> Parts:
    """Why gradients vanish: each step multiplies them by the derivative of tanh."""
    yield """
        # Vanishing and exploding gradients

        These are the experiments of *Deep Learning from Scratch 2*, sections 6.1.3 and 6.1.4. Every number is
        computed twice: by NumPy, as in the book, and by torch with torchclip.

        ## 6.1.3 Why gradients vanish or explode

        A recurrent network sends the gradient back through the same layer once for every time step. At each
        step the gradient passes two operations, a tanh and a matrix product. First the **tanh**: with
        `y = tanh(h)`, the backward pass multiplies the gradient by the derivative `dy/dh = 1 - y**2`.
        """
    _, y, dy = tanh_curve()
    _, y_torch, dy_torch = tanh_curve_torch()
    yield _series("tanh(h): from each h on, in steps of 0.1", -5, 0.1, y, y_torch)
    yield _series("dy/dh at the same h; in torch by autograd", -5, 0.1, dy, dy_torch)
    yield """
        The derivative is 1 at `h = 0` and smaller everywhere else. Beyond 3 on either side it is almost 0. A
        gradient that passes many saturated tanhs is multiplied by almost 0 many times. In the end it says
        almost nothing about how to lower the loss.
        """


def matmul() -> Parts:
    """Why gradients explode or vanish: each step multiplies them by the same weights."""
    exploding, vanishing = gradient_norms(scale=1.0), gradient_norms(scale=0.5)
    yield f"""
        ## Through the weights

        Now the **matrix product**. Each time step multiplies the gradient by the recurrent weights,
        `dh = dh @ Wh.T`, and these are the same weights at every step. Take a batch of {BATCH}, a hidden
        state of {HIDDEN}, a gradient of ones and standard normal weights:
        """
    yield Numbers(lambda _: _decimals(recurrent_weights(1.0)))
    yield "The L2 norm of the gradient divided by the batch size, at each of the steps back:"
    yield _series("Exploding gradients", 1, 1, exploding, gradient_norms_torch(scale=1.0))
    yield f"""
        The gradient **explodes**. In the end each step multiplies its norm by the same factor, here
        {exploding[-1] / exploding[-2]:.2f}: the largest magnitude among the eigenvalues of `Wh`. After enough
        steps the norm is too large for a float. Halve the weights, and the factor halves too:
        """
    yield Numbers(lambda _: _decimals(recurrent_weights(0.5)))
    yield _series("Vanishing gradients", 1, 1, vanishing, gradient_norms_torch(scale=0.5))
    yield f"""
        At {vanishing[-1] / vanishing[-2]:.2f} it is below 1, and the gradient **vanishes**: after {STEPS}
        steps its norm is {vanishing[-1]:.5f}. So the weights decide which of the two happens, and hardly any
        weights keep the balance.
        """


def clipping_at_each_step() -> Parts:
    """Clipping at each step limits the exploding gradient, and does not help the vanishing one."""
    yield f"""
        ## Clipped at each step

        One experiment that is not in the book: the exploding weights again, but with the gradient clipped to
        a norm of {MAX_NORM:g} (a mean norm of {MAX_NORM / BATCH:g}) after every step.
        """
    clipped, clipped_torch = gradient_norms(1.0, MAX_NORM), gradient_norms_torch(1.0, MAX_NORM)
    yield _series("Exploding gradients, clipped at each step", 1, 1, clipped, clipped_torch)
    yield """
        The first gradient is small enough and does not change. All later ones end at the threshold. Clipping
        does not help a vanishing gradient, since it never makes anything larger.
        """


def clipping() -> Parts:
    """The remedy for exploding gradients, on two arrays."""
    yield f"""
        ## 6.1.4 The remedy for exploding gradients

        In training, gradients are clipped once, after the whole backward pass and before the optimizer's
        step. The gradients of all parameters count as one long vector. If its norm is above the threshold,
        every gradient is multiplied by the same rate:

            rate = max_norm / (norm + 1e-6)
            if rate < 1:
                for grad in grads:
                    grad *= rate

        The step keeps its direction and only gets shorter. (The 1e-6 avoids a division by zero.)

        Two gradients of large numbers, and a threshold of {MAX_NORM}:
        """
    yield _example(large_gradients()[0])


def sharing() -> Parts:
    """Several arrays share one threshold; and all of it in a training loop."""
    yield """
        ## Three gradients share the threshold

        The same with three gradients. They share the one threshold, so each gets a smaller part of it:
        """
    yield _example(large_gradients()[1])
    yield """
        ## In your own training loop

            loss.backward()
            torchclip.clip_grad_norm_(model.parameters(), max_norm=5.0)
            optimizer.step()

        `torchclip train` shows what this line does for a language model.
        """


class Section(NamedTuple):
    """A part of the lesson."""

    title: str
    parts: Callable[[], Parts]

    def tell(self, console: Console) -> None:
        """Print it."""
        for part in self.parts():
            if isinstance(part, Numbers):
                console.print(Padding(part.show(console.width), (0, 0, 1, 2)), highlight=False)
            else:
                console.print(Markdown(cleandoc(part)), "")


SECTIONS = [
    Section("the activation", tanh),
    Section("the weights", matmul),
    Section("clipped at each step", clipping_at_each_step),
    Section("the remedy", clipping),
    Section("several gradients", sharing),
]


def _example(grads: Sequence[Array]) -> Numbers:
    """The worked example from top to bottom, NumPy and torch side by side; on little width NumPy alone."""

    def show(width: int) -> Table:
        sides = {"NumPy": worked_example(grads), "torch": worked_example_torch(grads)}
        if width < MEDIUM:
            del sides["torch"]
        names = [f"dW{i + 1}" for i in range(len(grads))]
        table = Table("", *sides, box=SIMPLE, show_edge=False, pad_edge=width >= NARROW)
        for name, grad in zip(names, grads, strict=True):
            table.add_row(name, *([_decimals(grad)] * len(sides)))
        table.add_section()
        table.add_row("norm", *(_decimals(side.norm) for side in sides.values()))
        table.add_row("rate", *(_decimals(side.rate) for side in sides.values()), end_section=True)
        for i, name in enumerate(names):
            table.add_row(f"{name}, clipped", *(_decimals(side.clipped[i]) for side in sides.values()))
        table.add_section()
        table.add_row("norm, clipped", *(_decimals(side.clipped_norm) for side in sides.values()))
        return table

    return Numbers(show)


def _series(title: str, first: float, step: float, values: Array, torchs: Array) -> Numbers:
    """Ten values a line, or five, NumPy's above the same of torch's, labelled by where the line starts.

    Args:
        title: what is above the table.
        first: where the first value is.
        step: how far the next one is from it.
        values: NumPy's values.
        torchs: the same by torch.
    """

    def show(width: int) -> Table:
        caption = f"largest difference between NumPy and torch: {np.max(np.abs(values - torchs)):.0e}"
        table = Table.grid(padding=(0, 1, 0, 0))
        table.title, table.caption = title, caption
        table.title_justify = table.caption_justify = "left"
        size = 10 if width >= WIDE else 5
        lines, lines_torch = (_decimals(v.reshape(-1, size)).splitlines() for v in (values, torchs))
        for i, (line, line_torch) in enumerate(zip(lines, lines_torch, strict=True)):
            label, torch_label = ("NumPy ", "torch ") if width >= NARROW else ("", "")
            table.add_row(f"{first + i * size * step:g}", f"{label}{line}")
            table.add_row("", f"{torch_label}{line_torch}", style="cyan")
        return table

    return Numbers(show)


def _decimals(values: Array | float) -> str:
    """Two decimals, as the book prints, a line for each row; 0.00 for what rounds to zero from below."""
    rows = np.atleast_2d(np.round(values, 2) + 0.0)
    width = max(5, len(f"{rows.max():.2f}"))
    return "\n".join(" ".join(f"{value:{width}.2f}" for value in row) for row in rows)
