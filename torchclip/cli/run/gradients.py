"""The norms of a program's gradients; nothing is changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor

from torchclip.clip_grad.norm import get_total_norm
from torchclip.clip_grad.per_parameter import clip_grad_norm_per_parameter_

Number: TypeAlias = float | Tensor
"""A number; on an accelerator a tensor, so that nothing waits for it."""


def as_number(value: Any) -> Number:
    """A loss or a norm of one element, perhaps a DTensor: read, or copied if reading it would wait."""
    if not isinstance(value, Tensor):
        return float(value)
    local: Any = getattr(value, "to_local", None)
    tensor: Tensor = value if local is None else local()
    return float(tensor.item()) if tensor.is_cpu else tensor.detach().reshape(()).clone()


def norm_of(parameters: Sequence[Tensor], grad_scale: Tensor | None = None) -> Number:
    """The norm of all gradients together, without a GradScaler's scale; 0 if there are none."""
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    return as_number(norm if grad_scale is None else norm / grad_scale.to(norm.device).reshape(()))


def norms_of(parameters: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The parameters with distinct gradients, and the norms of these."""
    owners = {id(p.grad): p for p in parameters if p.grad is not None}
    return [*owners.values()], clip_grad_norm_per_parameter_([*owners.values()], math.inf)


def nonfinite_ids(parameters: Sequence[Tensor]) -> list[int]:
    """The ``id`` of each parameter whose gradient is not finite.  Waits for an accelerator."""
    found, norms = norms_of(parameters)
    return [id(p) for p, norm in zip(found, norms.tolist(), strict=True) if not math.isfinite(norm)]
