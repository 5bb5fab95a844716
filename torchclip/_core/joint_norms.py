"""Joint norms: the norm of order p of a vector whose parts have the norms n.

It is ``leading * (sum((n / leading)^p))^(1/p)``, where ``leading`` is the largest of them (the least, for p
below 0).  Divided by it, no power leaves the range, for any p.  There are three forms:

- ``join_numbers`` for numbers on the host, without an array;
- ``join_rows`` for tensors, in few operations and without waiting for their device;
- ``join_columns`` for norms of several ranks, whose bits do not depend on the order in which they are added.

For the last one, two reductions of integers give the joint norm:

1. The maximum of ``keys``: the bits of nonnegative floats are ordered like the floats.
2. The sum of ``terms``: (n / leading)^p is between 0 and 1, and becomes a fixed-point number of 80 bits, in
   two limbs of 40.  64 bits have room for the sum of 2²³ - 1 of them.

So every way to reduce gives the same bits: along an axis of a matrix, or over ranks by a ring, a tree, or one
dimension of a mesh after the other.  The error is at most 1.8 units of 2⁻⁵³ for the orders 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm

from torchclip._core.scalars import ABSENT, Norm, in_one

Array = Any
"""A NumPy array, which is faster for few numbers, or a tensor; of float64 or int64."""

_LIMB = 2.0**40
_TERM = _LIMB * _LIMB
_INF, _NAN, _ABSENT = np.array([math.inf, math.nan, ABSENT]).view(np.int64).tolist()
# The least of all keys.
_NONE = -1
# Up to this many numbers are joined faster one by one than as an array.
_FEW = 64


def join(norms: Sequence[Norm] | Tensor, p: float) -> Norm:
    """The joint norm; waits for no device.

    ``ABSENT`` parts do not count; the result is ``ABSENT`` if there are no others.
    """
    if isinstance(norms, Tensor):
        return norms[0] if len(norms) == 1 else join_rows(norms, p)
    present = [norm for norm in norms if not (isinstance(norm, float) and norm < 0)]
    if len(present) < 2:
        return present[0] if present else ABSENT
    together = in_one(present)
    return join_numbers(together, p) if isinstance(together, list) else join_rows(together, p)


def join_numbers(norms: Sequence[float], p: float) -> float:
    """``join`` of numbers; for the orders 0, 1, 2 and infinity with the bits of ``join_columns``."""
    present = [norm for norm in norms if not norm < 0]
    if len(present) < 2:
        return present[0] if present else ABSENT
    if len(present) > _FEW:
        return float(join_columns(np.array(present).reshape(-1, 1), p)[0])
    total = sum(present)
    if total != total:  # only NaN is not equal to itself
        return math.nan
    if p == 0:
        return math.fsum(present)
    leading = max(present) if p > 0 else min(present)
    if math.isinf(p) or leading == 0 or math.isinf(leading):
        return leading
    ratios = [norm / leading for norm in present]
    powers = ratios if p == 1 else [r * r for r in ratios] if p == 2 else [r**p for r in ratios]
    total = math.fsum([power * _TERM // 1 for power in powers]) / _TERM
    if p in (1, 2):
        return leading * (total if p == 1 else math.sqrt(total))
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


# Norms of several ranks


@np.errstate(all="ignore")
def join_columns(norms: Array, p: float) -> Array:
    """The joint norms along the first axis; ``ABSENT`` where all norms are."""
    # For an order of at least 0 the leading norm is the largest, or NaN.
    leads = largest(norms) if p >= 0 else leading(largest(keys(norms, p)), p)
    if math.isinf(p):
        return leads
    high, low = terms(norms, leads, p)
    return root(leads, high.sum(0), low.sum(0), p)


def keys(norms: Array, p: float) -> Array:
    """Integers, of which the leading norm has the largest: NaN comes first, ``ABSENT`` last."""
    xp = _library(norms)
    bits = abs(norms).view(xp.int64)
    if p < 0:
        bits = _INF - bits
    return xp.where(norms != norms, _NAN, xp.where(norms < 0, _NONE, bits))


def leading(keys: Array, p: float) -> Array:
    """The norm with this key."""
    xp = _library(keys)
    bits = keys if p >= 0 else _INF - keys
    return xp.where(keys > _INF, _NAN, xp.where(keys < 0, _ABSENT, bits)).view(xp.float64)


def terms(norms: Array, leading: Array, p: float) -> tuple[Array, Array]:
    """What each norm adds to the sum, in two limbs: 0 for ``ABSENT``."""
    xp = _library(norms)
    # For order 0 it is the number of elements itself.
    ratio = norms / (leading if p != 0 else _LIMB)
    # Products are rounded in the same way everywhere; powers need not be.
    power = ratio if p in (0, 1) else ratio * ratio if p == 2 else ratio**p
    # It is negative for ABSENT, and NaN beside 0 or infinity, which are the joint norm themselves.
    scaled = xp.where(ratio >= 0, power, 0.0) * _LIMB
    high = xp.floor(scaled)
    low = xp.floor((scaled - high) * _LIMB)
    return xp.asarray(high, dtype=xp.int64), xp.asarray(low, dtype=xp.int64)


def root(leading: Array, high: Array, low: Array, p: float) -> Array:
    """The joint norm, from the leading norm and the sum of the terms."""
    xp = _library(leading)
    high, low = (xp.asarray(limb, dtype=xp.float64) for limb in (high, low))
    total = (high + low / _LIMB) / _LIMB
    if p == 0:
        joint = high
    elif p == 1:
        joint = leading * total
    elif p == 2:
        joint = leading * xp.sqrt(total)
    else:
        # With logarithms, as the root alone would leave the range for a small p.
        exponent = xp.log(total) / p
        by_logarithms = xp.exp(exponent + xp.log(leading))
        joint = xp.where(abs(exponent) < 600, leading * total ** (1 / p), by_logarithms)
    # Where 0, infinity, NaN or ABSENT leads, it is the joint norm.
    return xp.where((leading > 0) & (leading < math.inf), joint, leading)


def largest(array: Array) -> Array:
    """The largest numbers along the first axis."""
    return _library(array).amax(array, 0)


def _library(array: Array) -> Any:
    return torch if isinstance(array, Tensor) else np
