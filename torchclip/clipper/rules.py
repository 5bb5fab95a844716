"""What clipping by a rule without a norm needs: a trial on copies, and the factor for the norm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from torchclip._core import gather, mesh, scalars
from torchclip._core.batch import Norm


@contextmanager
def copied_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Replace gradients by copies within the context; parameters that share a gradient share its copy."""
    with_gradient = [(p, p.grad) for p in parameters if p.grad is not None]
    copies = {id(grad): grad.detach().clone() for grad in gather.distinct_gradients(parameters)}
    try:
        for parameter, grad in with_gradient:
            parameter.grad = copies[id(grad)]
        yield
    finally:
        for parameter, grad in with_gradient:
            parameter.grad = grad


def write_back(gradients: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into gradients from others with the same layout on the ranks."""
    with torch.no_grad():
        for held, of_held in zip(mesh.locals_of(gradients), mesh.locals_of(values), strict=True):
            held.copy_(of_held)
    torch.autograd.graph.increment_version(gradients)


def ratio(after: Norm, before: Norm) -> Norm:
    """The factor by which a norm changed, at most 1; 1 for no change, also of 0 or infinity."""
    is_same = (after == before) | (before == 0.0)
    quotient = after / scalars.where(is_same, 1.0, before)
    found: Norm = scalars.where(is_same | (quotient > 1.0), 1.0, quotient)
    return found
