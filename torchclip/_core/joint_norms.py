"""Joint norms: the norm of order p of a vector whose parts have the norms n.

It is ``leading * (sum((n / leading)^p))^(1/p)``, where ``leading`` is the largest of them (the least, for p
below 0).  Divided by it, no power leaves the range, for any p.  There are two forms: for numbers on the host,
and for tensors, in few operations and without waiting for their device.  Ranks join their norms by exact sums
of integers (``ranks.limbs``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.linalg import vector_norm

from torchclip._core.scalars import ABSENT, Norm, device_of, on_device


def join(norms: Sequence[Norm] | Tensor, p: float) -> Norm:
    """The joint norm; waits for no device.

    ``ABSENT`` parts do not count; the result is ``ABSENT`` if there are no others.
    """
    if len(norms) == 1:
        return norms[0]
    if isinstance(norms, Tensor):
        return join_rows(norms, p)
    device = device_of(norms)
    return (
        join_numbers(cast("list[float]", norms), p)
        if device is None
        else join_rows(on_device(norms, device), p)
    )


def join_numbers(norms: Sequence[float], p: float) -> float:
    """``join`` of numbers."""
    present = norms if min(norms, default=ABSENT) >= 0 else [norm for norm in norms if not norm < 0]
    if len(present) < 2:
        return present[0] if present else ABSENT
    total = sum(present)
    if total != total:  # only NaN is not equal to itself
        return math.nan
    if p == 2:
        return math.hypot(*present)
    leading = max(present) if p > 0 else min(present)
    if math.isinf(p) or (p and leading in (0, math.inf)):
        return leading
    if p in (0, 1):
        return total if total == math.inf else math.fsum(present)
    total = math.fsum([(norm / leading) ** p for norm in present])
    # With logarithms where the root alone would leave the range, as it does for a small p.
    exponent = math.log(total) / p
    if abs(exponent) < 600:
        return float(leading * total ** (1 / p))
    return math.inf if exponent + math.log(leading) > 709 else math.exp(exponent + math.log(leading))


# Tensors


def join_rows(norms: Tensor, p: float) -> Tensor:
    """The joint norms along the last dimension; ``ABSENT`` where all norms are."""
    if norms.shape[-1] == 0:
        return norms.new_full(norms.shape[:-1], ABSENT)
    absent = norms < 0
    joint = join_present(norms.masked_fill(absent, math.inf if p < 0 else 0.0), p)
    return joint.masked_fill(absent.all(dim=-1), ABSENT)


def join_present(norms: Tensor, p: float) -> Tensor:
    """``join_rows`` of norms of which none is ``ABSENT``, in few operations."""
    if p == 0:
        return norms.sum(dim=-1)
    leading = norms.amax(dim=-1) if p > 0 else norms.amin(dim=-1)
    if math.isinf(p):
        return leading
    divisor = divisor_like(leading)
    return vector_norms(norms / divisor.unsqueeze(-1), p) * divisor


def vector_norms(vectors: Tensor, p: float, dtype: torch.dtype | None = None) -> Tensor:
    """The norms along the last dimension.

    The dimension is counted from the front: torch 2.9 traces -1 to a wrong shape if its length is 1.
    """
    norms: Tensor = vector_norm(vectors, p, dim=vectors.dim() - 1, dtype=dtype)
    return norms


def divisor_like(leading: Tensor) -> Tensor:
    """The leading number, except 0 and infinity, by which quotients would be NaN."""
    limits = torch.finfo(leading.dtype)
    return leading.clamp(limits.tiny, limits.max)
