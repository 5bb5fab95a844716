"""The norms of a program's gradients, which do not change."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from torchclip._core import gather
from torchclip._core.batch import Norm, Norms
from torchclip._core.scalars import numbers

__all__ = ["nonfinite_ids", "norm_of", "norms_of"]


def norm_of(parameters: Sequence[Tensor]) -> Norm | None:
    """The norm of all gradients together, on an accelerator a tensor; None if there are none."""
    grads = [grad for parameter in parameters if (grad := parameter.grad) is not None]
    return gather.tensors(grads).norm(2.0) if grads else None


def norms_of(parameters: Sequence[Tensor]) -> tuple[list[Tensor], Norms]:
    """The norm of each gradient, and its parameter: the last of those that share it."""
    of_gradient = {id(grad): (p, grad) for p in parameters if (grad := p.grad) is not None}
    grads = [grad for _, grad in of_gradient.values()]
    return [p for p, _ in of_gradient.values()], gather.tensors(grads).norms(2.0)


def nonfinite_ids(parameters: Sequence[Tensor]) -> list[int]:
    """The ``id`` of each parameter whose gradient is not finite.  Waits for an accelerator."""
    found, norms = norms_of(parameters)
    return [id(p) for p, norm in zip(found, numbers(norms), strict=True) if not math.isfinite(norm)]
