"""The norms of a program's gradients, which do not change."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from torchclip._core import gather
from torchclip._core.batch import Norm, Norms
from torchclip._core.scalars import in_one, numbers
from torchclip.clipper.optimizers import unscaled


def norm_of(parameters: Sequence[Tensor], grad_scale: Tensor | None = None) -> Norm | None:
    """The norm of all gradients together, on an accelerator a tensor; None if there are none.

    Args:
        parameters: the parameters.
        grad_scale: the scale of a GradScaler by which the optimizer divides.
    """
    grads = gather.distinct_gradients(parameters)
    if not grads:
        return None
    norm = gather.tensors(grads).norm(2.0)
    return norm if grad_scale is None else unscaled(in_one([norm]), grad_scale, 2.0)[0]


def norms_of(parameters: Sequence[Tensor], grad_scale: Tensor | None = None) -> tuple[list[Tensor], Norms]:
    """The norm of each gradient, and its parameter: the last of those that share it."""
    grads, owners = gather.distinct_gradients(parameters), {id(p.grad): p for p in parameters}
    norms = gather.tensors(grads).norms(2.0)
    return [owners[id(grad)] for grad in grads], unscaled(norms, grad_scale, 2.0)


def nonfinite_ids(parameters: Sequence[Tensor]) -> list[int]:
    """The ``id`` of each parameter whose gradient is not finite.  Waits for an accelerator."""
    found, norms = norms_of(parameters)
    return [id(p) for p, norm in zip(found, numbers(norms), strict=True) if not math.isfinite(norm)]
