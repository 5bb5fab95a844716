"""Norms as integers, whose sum over ranks is exact: the same bits for any order of addition.

What ranks add are the squares of norms of order 2, and the norms of the orders 0 and 1 themselves.  These
powers are multiples of 2⁻²¹⁴⁸ (or 2⁻¹⁰⁷⁴) below 2²⁰⁴⁸.  So an integer of ``LIMBS`` limbs of 32 bits has room
for the sum of 2³¹ of them, and in int64 each limb of the sum stays in range, without carries.

Powers of other orders may leave that range.  Ranks first agree on the leading norm (the largest, or for an
order below 0 the smallest), and then add the powers of the quotients by it (``shares``).

For numbers on the host Python's integers do the work, for tensors some 40 operations, which do not wait.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from torchclip._core.batch import Norms
from torchclip._core.scalars import ABSENT

EXACT = (0.0, 1.0, 2.0)
"""The orders whose powers are added themselves."""
LIMBS = 133
_COUNTS = 3
WORDS = _COUNTS + LIMBS
"""The words of a norm: 1 if there is one, 1 if it is infinite, 1 if it is NaN, and the limbs of its power."""

_BITS = 32
_LIMB = (1 << _BITS) - 1
_LEAST = -1074
"""The smallest float64 number is 2 to this power."""
_MANTISSA = 52
_HALF = 27
_INF, _NAN, _ABSENT = np.array([math.inf, math.nan, ABSENT]).view(np.int64).tolist()


def words(norms: Norms, p: float) -> Tensor:
    """Each norm as a row of words, to be added to those of other ranks; ``ABSENT`` is zeros."""
    if isinstance(norms, Tensor):
        return _words_on_device(norms, p)
    rows = np.zeros((len(norms), WORDS), np.int64)
    for row, norm in zip(rows, norms, strict=True):
        row[:_COUNTS] = not norm < 0, norm == math.inf, norm != norm
        if 0 < norm < math.inf:
            mantissa, exponent = math.frexp(norm)
            # A denormal number ends in zeros where the shift is negative.
            number = _shifted(int(mantissa * 2**53), exponent - 53 - _LEAST)
            power = number * number if p == 2 else number
            row[_COUNTS:] = np.frombuffer(power.to_bytes(LIMBS * _BITS // 8, "little"), "<u4")
    return torch.from_numpy(rows)


def joint(total: Tensor, p: float, on_host: bool) -> Norms:
    """The joint norms, from the sums of words: a list on the host."""
    if not on_host:
        return _joint_on_device(total, p)
    found = []
    for row in total.numpy():
        present, infinite, nan = row[:_COUNTS].tolist()
        if nan or infinite or not present:
            found.append(math.nan if nan else math.inf if infinite else ABSENT)
            continue
        low, high = (
            (part & _LIMB).astype("<u4").tobytes() for part in (row[_COUNTS:], row[_COUNTS:] >> _BITS)
        )
        power = int.from_bytes(low, "little") + (int.from_bytes(high, "little") << _BITS)
        found.append(_root_of(power, p))
    return found


def _root_of(power: int, p: float) -> float:
    """The number whose power this is, correctly rounded."""
    number, exponent = power, _LEAST
    if p == 2:
        # About 128 bits give a root of 64; a last bit of 1 stands for all that is cut off.
        cut = (power.bit_length() - 128) // 2
        square = _shifted(power, -2 * cut)
        root = math.isqrt(square)
        is_exact = root * root == square and _shifted(square, 2 * cut) == power
        number, exponent = 2 * root + (not is_exact), _LEAST + cut - 1
    try:
        return number / (1 << -exponent) if exponent < 0 else float(number << exponent)
    except OverflowError:
        return math.inf


def _shifted(number: int, by: int) -> int:
    return number << by if by >= 0 else number >> -by


# On a device


def _words_on_device(norms: Tensor, p: float) -> Tensor:
    counts = torch.stack([~(norms < 0), norms == math.inf, norms != norms], dim=1)
    is_finite = (norms >= 0) & (norms < math.inf)
    bits = torch.where(is_finite, norms, 0.0).view(torch.int64)
    exponent = bits >> _MANTISSA
    mantissa = (bits & ((1 << _MANTISSA) - 1)) + ((exponent > 0).long() << _MANTISSA)
    shift = (exponent - 1).clamp(min=0).unsqueeze(1)
    numbers = mantissa.unsqueeze(1)
    if p == 2:  # the square of a sum of two halves has three terms, each below 2⁶³
        high, low = mantissa >> _HALF, mantissa & ((1 << _HALF) - 1)
        numbers = torch.stack([low * low, 2 * high * low, high * high], dim=1)
        shift = 2 * shift + torch.arange(0, 3 * _HALF, _HALF, device=norms.device)
    # Of each number every limb has the bits that lie there after the shift.
    right = torch.arange(0, LIMBS * _BITS, _BITS, device=norms.device) - shift.unsqueeze(2)
    parts = numbers.unsqueeze(2) >> right.clamp(0, 63) << (-right).clamp(0, _BITS)
    return torch.cat([counts.long(), (parts & _LIMB).sum(dim=1)], dim=1)


def _joint_on_device(total: Tensor, p: float) -> Tensor:
    present, infinite, nan = (total[:, :_COUNTS] > 0).unbind(dim=1)
    limbs = total[:, _COUNTS:]
    for _ in range(2):  # afterwards each limb is at most 2³²
        limbs = (limbs & _LIMB) + pad(limbs[:, :-1] >> _BITS, (1, 0))
    # Five limbs from the highest that is not 0 have at least 128 bits.
    place = torch.arange(LIMBS, device=limbs.device)
    highest = ((limbs > 0) * place).amax(dim=1)
    padded = pad(limbs, (4, 0))
    window = padded.gather(1, highest.unsqueeze(1) + place[:5]).to(torch.float64)
    power = window[:, 0]
    for i in range(1, 5):
        power = power * 2.0**-_BITS + window[:, i]
    root = power.sqrt() if p == 2 else power
    exponent = highest * (_BITS // 2 if p == 2 else _BITS) + _LEAST
    half = exponent >> 1
    finite = root * _power_of_2(half) * _power_of_2(exponent - half)
    found = torch.where(present, finite, ABSENT)
    return torch.where(nan, math.nan, torch.where(infinite, math.inf, found))


def _power_of_2(exponent: Tensor) -> Tensor:
    return (exponent + 1023 << _MANTISSA).view(torch.float64)


# Other orders


def keys(norms: Tensor, p: float) -> Tensor:
    """Integers, of which the leading norm has the largest: NaN comes first, ``ABSENT`` last."""
    # The bits of floats that are not negative are ordered as they are.
    bits = norms.abs().view(torch.int64)
    bits = _INF - bits if p < 0 else bits
    return torch.where(norms != norms, _NAN, torch.where(norms < 0, -1, bits))


def leading(keys: Tensor, p: float) -> Tensor:
    """The norms with these keys."""
    bits = _INF - keys if p < 0 else keys
    return torch.where(keys > _INF, _NAN, torch.where(keys < 0, _ABSENT, bits)).view(torch.float64)


def shares(norms: Tensor, leading: Tensor, p: float) -> Tensor:
    """The powers of the quotients by the leading norms, from 0 to 1."""
    quotients = norms / leading
    # It is NaN beside 0 or infinity, which are the joint norm themselves, and negative for ABSENT.
    return torch.where(quotients >= 0, quotients**p, 0.0)


def from_shares(leading: Tensor, total: Tensor, p: float) -> Tensor:
    """The joint norms, from the leading ones and the sums of shares."""
    # With logarithms where the root alone would leave the range, as for a small p.
    exponent = total.log() / p
    by_logarithms = torch.exp(exponent + leading.log())
    found = torch.where(exponent.abs() < 600, leading * total ** (1 / p), by_logarithms)
    # Where 0, infinity, NaN or ABSENT leads, it is the joint norm.
    return torch.where((leading > 0) & (leading < math.inf), found, leading)
