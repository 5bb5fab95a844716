"""The norms of a program's gradients, which do not change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchclip._core import gather
from torchclip._core.batch import Norm
from torchclip._core.scalars import is_finite, on_device

__all__ = ["nonfinite_ids", "norm_of", "norms_of", "with_gradient"]


def with_gradient(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters that have a gradient."""
    return [parameter for parameter in parameters if parameter.grad is not None]


def norm_of(parameters: Sequence[Tensor]) -> Norm | None:
    """The norm of all gradients together, on an accelerator a tensor; None if there are none."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return gather.tensors(grads).norm(2.0) if grads else None


def norms_of(parameters: Sequence[Tensor]) -> Tensor:
    """The norm of each gradient of parameters that have one."""
    with torch.no_grad():
        batch = gather.tensors([parameter.grad for parameter in parameters if parameter.grad is not None])
        norms = batch.norms(2.0)
        device = norms.device if isinstance(norms, Tensor) else torch.device("cpu")
        found = on_device(norms, device)
        if len(batch.all) == len(parameters):
            return found
        # Several parameters may share a gradient.
        rows = {id(grad): row for row, grad in enumerate(batch.all)}
        return found[[rows[id(parameter.grad)] for parameter in parameters]]


def nonfinite_ids(parameters: Sequence[Tensor]) -> list[int]:
    """The ``id`` of each parameter whose gradient is not finite.  Waits for an accelerator."""
    found = with_gradient(parameters)
    return [id(p) for p, norm in zip(found, norms_of(found).tolist(), strict=True) if not is_finite(norm)]
