"""Joint norms whose bits do not depend on the order in which parts are added: sums of integers.

The norm of order p of a vector whose parts have the norms n is ``leading * (sum((n / leading)^p))^(1/p)``,
where ``leading`` is the largest of them (the least, for p below 0).  Two reductions of integers give it:

1. The maximum of ``keys``: the bits of nonnegative floats are ordered like the floats.
2. The sum of ``terms``: (n / leading)^p is between 0 and 1, and becomes a fixed-point number of 80 bits, in
   two limbs of 40.  64 bits have room for the sum of 2²³ - 1 of them.

So every way to reduce gives the same bits: along an axis of a matrix, or over ranks by a ring, a tree, or one
dimension of a mesh after the other.  The error is at most 1.8 units of 2⁻⁵³ for the orders 1 and 2.

All functions take NumPy arrays, which are faster for few numbers, or tensors, for which they do not wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchclip._core.scalars import ABSENT

Array = Any
"""A NumPy array or a tensor, of float64 or int64."""

_LIMB = 2.0**40
_INF, _NAN, _ABSENT = np.array([math.inf, math.nan, ABSENT]).view(np.int64).tolist()
# The least of all keys.
_NONE = -1


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
    high, low = _limbs(norms, leading, p)
    return xp.asarray(high, dtype=xp.int64), xp.asarray(low, dtype=xp.int64)


def _limbs(norms: Array, leading: Array, p: float) -> tuple[Array, Array]:
    """``terms`` as whole numbers of float64, whose sum is exact for thousands of them, too."""
    xp = _library(norms)
    # For order 0 it is the number of elements itself.
    ratio = norms / (leading if p != 0 else _LIMB)
    # It is negative for ABSENT, and NaN beside 0 or infinity, which are the joint norm themselves.
    powers = xp.where(ratio >= 0, _power(ratio, p), 0.0) * _LIMB
    high = xp.floor(powers)
    return high, xp.floor((powers - high) * _LIMB)


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


def join(norms: Array, p: float) -> Array:
    """The joint norms along the first axis; ``ABSENT`` where all norms are."""
    # For an order of at least 0 the leading norm is the largest, or NaN.
    leads = largest(norms) if p >= 0 else leading(largest(keys(norms, p)), p)
    if math.isinf(p):
        return leads
    high, low = _limbs(norms, leads, p)
    return root(leads, high.sum(0), low.sum(0), p)


def join_few(norms: Sequence[float], p: float) -> float:
    """``join`` of a few numbers, with the same bits in a tenth of the time for the orders 1 and 2."""
    if p not in (1, 2):
        with np.errstate(all="ignore"):
            # Along an axis: NumPy does not round the powers of single numbers like those of arrays.
            return float(join(np.array(norms).reshape(-1, 1), p)[0])
    leads = max(norms)
    if sum(norms) != sum(norms):  # only if one of them is NaN
        return math.nan
    if not 0 < leads < math.inf:
        return leads
    high = low = 0
    for norm in norms:
        if norm > 0:
            power = _power(norm / leads, p) * _LIMB
            whole = math.floor(power)
            high += whole
            low += math.floor((power - whole) * _LIMB)
    total = (high + low / _LIMB) / _LIMB
    return leads * (total if p == 1 else math.sqrt(total))


def largest(array: Array) -> Array:
    """The largest numbers along the first axis."""
    return array.amax(0) if isinstance(array, Tensor) else array.max(0)


def _library(array: Array) -> Any:
    return torch if isinstance(array, Tensor) else np


def _power(ratio: Array, p: float) -> Array:
    # Products are rounded in the same way everywhere; powers need not be.
    return ratio if p in (0, 1) else ratio * ratio if p == 2 else ratio**p
