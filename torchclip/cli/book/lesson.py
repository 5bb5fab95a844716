"""The prose of the book's chapter, and its numbers by NumPy and by torch beside each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def explain_tanh(console: Console) -> None:
    """Why gradients vanish: each step multiplies them by the derivative of tanh."""
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
    _show(console, _series(console, "tanh(h): from each h on, in steps of 0.1", -5, 0.1, y, y_torch))
    _show(console, _series(console, "dy/dh at the same h; in torch by autograd", -5, 0.1, dy, dy_torch))
    _say(
        console,
        """
        The derivative is 1 at `h = 0` and smaller everywhere else; beyond 3 on either side next to nothing is
        left of it. A gradient that passes many saturated tanhs is multiplied by almost 0 many times, and what
        arrives says almost nothing about how to lower the loss.
        """,
    )


def explain_matmul(console: Console) -> None:
    """Why gradients explode or vanish: each step multiplies them by the same weights."""
    _say(
        console,
        f"""
        ## Through the weights

        Now the **matrix product**. Going back through one time step multiplies the gradient by the recurrent
        weights, `dh = dh @ Wh.T`, and these are the same weights on every step. Take a batch of {BATCH}, a
        hidden state of {HIDDEN}, a gradient of ones and standard normal weights:
        """,
    )
    _show(console, _decimals(recurrent_weights(1.0)))
    _say(console, "The L2 norm of the gradient divided by the batch size, on each of the steps back:")
    exploding = gradient_norms(scale=1.0)
    _show(console, _series(console, "Exploding Gradients", 1, 1, exploding, gradient_norms_torch(scale=1.0)))
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
    _show(console, _series(console, "Vanishing Gradients", 1, 1, vanishing, gradient_norms_torch(scale=0.5)))
    _say(
        console,
        f"""
        At {vanishing[-1] / vanishing[-2]:.2f} it is below 1, and the gradient **vanishes**: a norm of
        {vanishing[-1]:.5f} is left after {STEPS} steps. So the weights decide which of the two happens, and
        hardly any weights keep the balance.
        """,
    )


def explain_clipping_at_each_step(console: Console) -> None:
    """Clipping at each step holds the exploding gradient, and does not help the vanishing one."""
    _say(
        console,
        f"""
        ## Clipped at each step

        The book leaves the chain here. One experiment more: the exploding weights again, with the gradient
        clipped to a norm of {MAX_NORM:g} (a mean norm of {MAX_NORM / BATCH:g}) after every step.
        """,
    )
    clipped, clipped_torch = gradient_norms(1.0, MAX_NORM), gradient_norms_torch(1.0, MAX_NORM)
    _show(
        console, _series(console, "Exploding Gradients, Clipped at Each Step", 1, 1, clipped, clipped_torch)
    )
    _say(
        console,
        """
        The first gradient is small enough and stays as it is; all later ones end on the threshold. Clipping
        cannot help the vanishing gradient, since it never makes anything larger.
        """,
    )


def explain_clipping(console: Console) -> None:
    """The remedy for exploding gradients, on two arrays."""
    two, _ = large_gradients()
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
    _show(console, _example(console, two))


def explain_sharing(console: Console) -> None:
    """Several arrays share one threshold; and what all of it is in a training loop."""
    _, three = large_gradients()
    _say(
        console,
        """
        ## Three gradients share the threshold

        The same with three gradients. They share the one threshold, so each gets less of it:
        """,
    )
    _show(console, _example(console, three))
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


def _example(console: Console, grads: Sequence[Array]) -> Table:
    """The worked example from top to bottom, NumPy and torch side by side; on little width NumPy alone."""
    sides = {"NumPy": worked_example(grads), "torch": worked_example_torch(grads)}
    if console.width < MEDIUM:
        del sides["torch"]
    table = Table("", *sides, box=SIMPLE, show_edge=False, pad_edge=console.width >= NARROW)
    for i, grad in enumerate(grads):
        table.add_row(f"dW{i + 1}", *([_decimals(grad)] * len(sides)))
    table.add_section()
    table.add_row("norm", *(_decimals(side.norm) for side in sides.values()))
    table.add_row("rate", *(_decimals(side.rate) for side in sides.values()))
    table.add_section()
    for i in range(len(grads)):
        table.add_row(f"dW{i + 1}, clipped", *(_decimals(side.clipped[i]) for side in sides.values()))
    table.add_section()
    table.add_row("norm, clipped", *(_decimals(side.clipped_norm) for side in sides.values()))
    return table


def _series(console: Console, title: str, first: float, step: float, values: Array, torchs: Array) -> Table:
    """Ten values a line, or five, NumPy's above the same of torch's, labelled by where the line starts.

    Args:
        console: whose width decides.
        title: what is above the table.
        first: where the first value is.
        step: how far the next one is from it.
        values: NumPy's values.
        torchs: the same by torch.
    """
    table = Table(
        box=None,
        show_header=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=title,
        title_justify="left",
        caption=f"largest difference between NumPy and torch: {np.max(np.abs(values - torchs)):.0e}",
        caption_justify="left",
    )
    size = 10 if console.width >= WIDE else 5
    lines, lines_torch = (_decimals(v.reshape(-1, size)).splitlines() for v in (values, torchs))
    for i, (line, line_torch) in enumerate(zip(lines, lines_torch, strict=True)):
        label, torch_label = ("NumPy ", "torch ") if console.width >= NARROW else ("", "")
        table.add_row(f"{first + i * size * step:g}", f"{label}{line}")
        table.add_row("", f"{torch_label}{line_torch}", style="cyan")
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


class Section(NamedTuple):
    """A part of the lesson."""

    title: str
    tell: Callable[[Console], None]


SECTIONS = [
    Section("the activation", explain_tanh),
    Section("the weights", explain_matmul),
    Section("clipped at each step", explain_clipping_at_each_step),
    Section("the remedy", explain_clipping),
    Section("several gradients", explain_sharing),
]
