"""Arithmetic on norms and clip coefficients: floats, or float64 tensors that must not be read."""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias, cast, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from torchclip._core import arguments, memory

Norm: TypeAlias = float | Tensor
"""A number known on the host, or a 0-dim float64 tensor for which the host should not wait."""
Norms: TypeAlias = "list[float] | Tensor"
"""Several such numbers: a list, or a float64 tensor of one dimension."""
ABSENT = -1.0
"""The norm of no elements; it does not change a joint norm of any order."""

_CPU = torch.device("cpu")
_OF_HOST = frozenset({float, int, list})
_SHOWN = 10


def norm_dtype(device: torch.device) -> torch.dtype:
    """The dtype of norms on a device: float64, or float32 on mps, which has no wider one."""
    return torch.float32 if device.type == "mps" else torch.float64


def on_device(norms: Sequence[Norm] | Tensor, device: torch.device | str) -> Tensor:
    """Norms as a one-dimensional tensor on a device, without waiting for it."""
    device = torch.device(device)
    dtype = norm_dtype(device)
    if isinstance(norms, Tensor):
        return norms.to(device, dtype)
    if device_of(norms) is None:
        vector = torch.tensor(norms, dtype=dtype, device=_CPU)
        return vector if device.type == "cpu" else vector.to(device, non_blocking=True)
    # The device writes the number, as a copy from the host would wait.
    return torch.stack(
        [
            torch.full((), norm, dtype=dtype, device=device)
            if isinstance(norm, (int, float))
            else norm.to(device, dtype)
            for norm in norms
        ]
    )


def _beside(norms: Tensor, values: Norms) -> Tensor:
    """Numbers as a tensor that operations take together with norms."""
    if type(norms) in memory.PLAIN or isinstance(values, Tensor):
        return on_device(values, norms.device)
    # A fake tensor outside its mode takes only tensors that were made from it.
    return torch.stack([norms.new_full((), value) for value in values])


def vector(norms: Sequence[float]) -> Tensor:
    """Norms as a tensor in host memory, several times faster than with ``torch.tensor``."""
    if not norms:
        return torch.zeros(0, dtype=torch.float64, device=_CPU)
    return torch.frombuffer(array("d", norms), dtype=torch.float64)


# Numbers on the host or on a device


def device_of(values: Collection[Norm | Norms]) -> torch.device | None:
    """The device of the first number that is on one; None if all are on the host."""
    # Many times faster than checking each, but torch.compile of torch 2.6 can trace the loop only.
    if not is_dynamo_compiling() and _OF_HOST.issuperset(map(type, values)):
        return None
    for value in values:
        if isinstance(value, Tensor):
            return value.device
    return None


def numbers(norms: Norms) -> list[float]:
    """Norms as numbers; waits if they are on a device."""
    return norms if isinstance(norms, list) else norms.tolist()


def in_one(norms: Sequence[Norm]) -> Norms:
    """Single norms as several: a tensor if one of them is."""
    device = device_of(norms)
    if device is not None and len(norms) == 1:
        return cast("Tensor", norms[0]).unsqueeze(0)
    return cast("list[float]", list(norms)) if device is None else on_device(norms, device)


def where(condition: bool | Tensor, a: Any, b: Any) -> Any:
    """``a`` where a condition holds, ``b`` elsewhere.

    With a condition on a device, two floats would become a float32 tensor: pass a norm, or integers.
    """
    return torch.where(condition, a, b) if isinstance(condition, Tensor) else a if condition else b


def concatenate(several: Sequence[Norms]) -> Norms:
    """All norms in one list or tensor."""
    if len(several) == 1:
        return several[0]
    device = device_of(several)
    if device is None:
        return [norm for norms in several for norm in cast("list[float]", norms)]
    return torch.cat([on_device(norms, device) for norms in several])


def at(norms: Norms, places: Sequence[int | None]) -> Norms:
    """The norms at some places, ``ABSENT`` for None."""
    if isinstance(norms, list):
        return [ABSENT if place is None else norms[place] for place in places]
    if list(places) == list(range(len(norms))):
        return norms
    padded = torch.cat([norms, norms.new_full((1,), ABSENT)])
    rows = [len(norms) if place is None else place for place in places]
    index = torch.tensor(rows, dtype=torch.int64, device=_CPU)  # also of an empty list
    return padded[index.to(norms.device, non_blocking=True)]


def divided(norms: Norms, divisors: Norms) -> Norms:
    """Norms, each divided by its own number, or all by a single one, which may be on another device."""
    if not isinstance(norms, list):
        return norms / _beside(norms, divisors)
    by = numbers(divisors)
    return [norm / by[i if len(by) > 1 else 0] for i, norm in enumerate(norms)]


def replaced(values: Norms, where: bool | Sequence[bool] | Tensor, value: float) -> Norms:
    """Numbers, some of which another number replaces.

    Args:
        values: the numbers.
        where: whether to replace each of them, or all.  A truth value on a device replaces no numbers on the
            host.
        value: what to put there.
    """
    if where is False:
        return values
    of_host = isinstance(where, (bool, list))
    if isinstance(values, list):
        places = where if isinstance(where, list) else [of_host] * len(values)
        return [value if is_there else old for old, is_there in zip(values, places, strict=True)]
    mask = torch.tensor(where, device=_CPU) if of_host else cast("Tensor", where)
    return values.masked_fill(mask.to(values.device, non_blocking=True), value)


def at_most(values: Norms, most: Norm) -> Norms:
    """The numbers, limited to at most another number; NaN stays NaN."""
    if device_of([values, most]) is None:
        return [value if value != value else min(value, cast("float", most)) for value in numbers(values)]
    return on_device(values, device_of([values, most])).clamp(max=most)  # type: ignore[arg-type]


def smallest(values: Norms, otherwise: float) -> Norm:
    """The smallest of several numbers; NaN if any of them is."""
    if len(values) < 2:
        return values[0] if len(values) else otherwise
    if isinstance(values, list):
        total = sum(values)  # NaN if any is
        return min(values) if total == total else math.nan
    return values.amin()


def may_change(clip_coef: Norm) -> bool:
    """Whether multiplying by a number may change something; does not wait to see whether a tensor is 1."""
    return not (isinstance(clip_coef, float) and clip_coef == 1.0)


def present(norm: Norm) -> Norm:
    """A norm, or 0 in place of ``ABSENT``."""
    return max(norm, 0.0) if isinstance(norm, (int, float)) else norm.clamp(min=0.0)


def is_nonfinite(norm: Norm) -> bool | Tensor:
    """Whether a norm is infinite or NaN; does not wait."""
    return not math.isfinite(norm) if isinstance(norm, (int, float)) else ~norm.isfinite()


# Clip coefficients

EPS = 1e-6
"""The number that torch adds to the norm in the denominator of the clip coefficient."""


@overload
def clip_coef(max_norm: float, norm: float, eps: float = EPS) -> float: ...
@overload
def clip_coef(max_norm: float | Tensor, norm: Tensor, eps: float = EPS) -> Tensor: ...
@overload
def clip_coef(max_norm: Norm, norm: Norm, eps: float = EPS) -> Norm: ...


def clip_coef(max_norm: Norm, norm: Norm, eps: float = EPS) -> Norm:
    """What gradients are multiplied by: ``min(1, max_norm / (norm + eps))``; NaN for a NaN norm.

    With ``eps`` 0, for thresholds that were learned from norms, a norm up to the threshold gives exactly 1.
    ``ABSENT`` gives 1, and so does an infinite threshold, which only measures, also for a norm of NaN.

    Tensors may have any shape: each element is a norm.
    """
    if not (isinstance(norm, (int, float)) and isinstance(max_norm, (int, float))):
        return _clip_coef_tensor(max_norm, norm, eps)
    if max_norm == math.inf or norm < 0 or (eps == 0 and norm <= max_norm):
        return 1.0
    coef = max_norm / (norm + eps)
    return 1.0 if coef >= 1.0 else coef


def _clip_coef_tensor(max_norm: Norm, norm: Norm, eps: float) -> Tensor:
    if isinstance(norm, (int, float)):
        norm = torch.full_like(cast("Tensor", max_norm), norm)
    limits = max_norm
    if isinstance(max_norm, float):
        if max_norm == math.inf:
            return torch.ones_like(norm)
        # Torch would multiply a plain number by the reciprocal of the norm, which may be infinite.
        limits = torch.full_like(norm, max_norm)
        if max_norm > eps > 0:  # then the formula gives 1 for ABSENT, too
            return (limits / (norm.clamp(min=0.0) + eps)).clamp(max=1.0)
    # 0/0 and inf/inf must not become NaN.
    as_they_are = norm <= limits if eps == 0 else norm < 0.0
    if isinstance(max_norm, Tensor):
        as_they_are = as_they_are | (max_norm == math.inf)
    return (limits / (norm + eps)).clamp(max=1.0).masked_fill(as_they_are, 1.0)


def clip_coefs(max_norms: float | Norms, norms: Norms, eps: float = EPS) -> Norms:
    """``clip_coef`` of several norms, with one threshold for all of them or one for each."""
    if not isinstance(norms, list):
        return clip_coef(max_norms if isinstance(max_norms, float) else _beside(norms, max_norms), norms, eps)
    if isinstance(max_norms, float):
        # No quotient is below 1, and the sum is NaN if any norm is.
        if norms and max(norms) + eps <= max_norms and sum(norms) < math.inf:
            return [1.0] * len(norms)
        if max_norms == math.inf:
            return [1.0] * len(norms)
        # As in ``clip_coef``, which would be a call for each norm.
        return [1.0 if norm + eps <= max_norms else max_norms / (norm + eps) for norm in norms]
    return [
        1.0 if norm + eps <= limit else clip_coef(limit, norm, eps)
        for limit, norm in zip(numbers(max_norms), norms, strict=True)
    ]


def check_finite(
    total_norm: Norm,
    norm_type: float,
    tensors: Sequence[Tensor],
    names: Mapping[int, str] | None = None,
    remedy: str = "To disable this error and scale the gradients by the non-finite norm anyway, set "
    "`error_if_nonfinite=False`",
    argument: str = "parameters",
) -> None:
    """Raise torch's error if the norm is not finite, and name the gradients that cause it.

    Args:
        total_norm: the norm; on an accelerator this waits for it.
        norm_type: its order.
        tensors: the gradients.
        names: the names of gradients, by their ``id``; others are named by their position.
        remedy: what the user can do.
        argument: the name of the argument with the gradients.
    """
    if math.isfinite(total_norm):
        return
    found = []
    for i, tensor in enumerate(tensors):
        held = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        (values,) = memory.stored(held.detach(), math.inf)
        inf, nan = int(values.isinf().sum()), int(values.isnan().sum())
        if inf or nan:
            name = names.get(id(tensor)) if names else None
            found.append(f"{name or f'gradient {i}'} of shape {tuple(tensor.shape)} ({inf} inf, {nan} nan)")
    elsewhere = (
        "none of this rank's"
        if dist.is_available() and dist.is_initialized()
        else "none, the norm exceeds float64"
    )
    which = arguments.some(found, _SHOWN) if found else elsewhere
    raise RuntimeError(
        f"The total norm of order {norm_type} for gradients from `{argument}` is non-finite, so it cannot be "
        f"clipped. {remedy}. No gradient was changed. Non-finite: {which}."
    )
