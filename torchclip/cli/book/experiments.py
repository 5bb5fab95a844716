"""The experiments of the book's chapter on exploding gradients.

The subject is sections 6.1.3 and 6.1.4 of *Deep Learning from Scratch 2*: why gradients vanish or explode on
their way back through a recurrent network, and clipping as the remedy for the second.  Each experiment is a
function that returns its numbers, written twice: with the NumPy reference, as in the book, and with torch and
torchclip (``*_torch``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

import torchclip
from torchclip import reference
from torchclip.cli.figures import Array

SEED = 3
BATCH = 2  # N in the book
HIDDEN = 3  # H
STEPS = 20  # T
MAX_NORM = 5.0


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
