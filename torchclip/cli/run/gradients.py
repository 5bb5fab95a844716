"""The parameters and gradients of a program's optimizers, and their norms; nothing is changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchclip.clip_grad.norm import get_total_norm
from torchclip.clip_grad.per_parameter import clip_grad_norm_per_parameter_

Number: TypeAlias = float | Tensor
"""A number; on an accelerator a tensor, so that nothing waits for it."""


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of an optimizer, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


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


def joint(norms: Sequence[Number]) -> Number:
    """The norm of several sets of gradients together."""
    values = _in_one(norms)
    return values.norm() if isinstance(values, Tensor) else math.hypot(*values)


def smallest(values: Sequence[Number]) -> Number:
    """The smallest of some numbers."""
    found = _in_one(values)
    return found.min() if isinstance(found, Tensor) else min(found)


def _in_one(values: Sequence[Number]) -> Tensor | list[float]:
    """Numbers as a list, or as a tensor if some are on an accelerator."""
    device = next((each.device for each in values if isinstance(each, Tensor)), None)
    if device is None:
        return [float(each) for each in values]
    return torch.stack([torch.as_tensor(each, device=device, dtype=torch.float32) for each in values])


def coefficient(max_norm: float, norm: Number) -> Number:
    """The number by which gradients of this norm are multiplied."""
    if max_norm == math.inf:
        return 1.0
    coef = max_norm / (norm + 1e-6)
    return coef.clamp(max=1.0) if isinstance(coef, Tensor) else min(coef, 1.0)
