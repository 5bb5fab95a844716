"""The 2-norm of few elements, which stay in the cache, so that calls take longer than arithmetic.

NumPy's calls cost a fifth of torch's, and so few elements do not need a second thread.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchclip._core import memory

MOST = 1 << 19
"""The largest number of elements that this module handles."""
# From this many elements on, a verified float32 norm is cheaper than an exact one.
_LARGE = 1 << 16
# How many are summed in float32, in many lanes: so few that no BLAS splits them over threads.
_ROW = 1 << 9
# One row in this many is summed again.
_EVERY = 47
_WIDENED = 1 << 14

Array: TypeAlias = "npt.NDArray[np.floating[Any]]"


def is_accurate(whole: float, sampled: float, exact: float, rows: int, every: int, p: float) -> bool:
    """Whether a sum of powers, taken in float32 within rows and in float64 over rows, is accurate.

    For most gradients the rows' rounding errors cancel out (to some 1e-9).  If they do not, as for constant
    gradients, the sampled rows show it.

    Args:
        whole: the sum.
        sampled: the sum of one row in ``every``.
        exact: the sum of these rows in float64.
        rows: the number of rows.
        every: how many rows there are for each sampled one.
        p: the power.
    """
    # Far from both ends of the float32 range, where squares overflow or lose their digits.
    in_range = (1e-15 * rows) ** p < whole < 1e15**p
    # If the sampled rows are almost 0, they say nothing about the others.
    telling = 4 * every * exact > whole
    return in_range and telling and abs(sampled - exact) <= p * 2e-8 * exact


def norm(tensors: Sequence[Tensor], sizes: Sequence[int]) -> float:
    """The norm of tensors for which ``memory.common_dtype`` gives a dtype of at most float32."""
    vectors = _vectors(tensors, sizes)
    with np.errstate(all="ignore"):  # no warning: what overflows float32 is computed again
        squares = _verified(vectors) if sum(sizes) >= _LARGE else None
        return math.sqrt(sum(map(_exact, vectors)) if squares is None else squares)


def _vectors(tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[Array]:
    """The elements in float32, with small tensors joined in one vector."""
    if max(sizes) <= memory.JOINED:
        return [_vector(memory.concatenate(tensors))]
    vectors, small = [], []
    for tensor, size in zip(tensors, sizes, strict=True):
        if size > memory.JOINED:
            vectors.append(_vector(tensor))
        else:
            small.append(tensor)
    if small:
        vectors.append(_vector(memory.concatenate(small)))
    return vectors


def _vector(tensor: Tensor) -> Array:
    """The elements of a contiguous tensor in float32: its own memory, if it has that dtype.

    Not with ``numpy()``, after which torch refuses to resize the storage; nor with DLPack, which takes three
    times as long.
    """
    values = tensor if tensor.dtype is torch.float32 else tensor.float()
    elements = _floats(values.numel()).from_address(values.data_ptr())
    elements.owner = values  # keeps the tensor alive as long as its memory is in use
    return np.frombuffer(elements, np.float32)


@lru_cache(1024)
def _floats(count: int) -> Any:
    """The ctypes type of an array, cached as making it takes longer than making the array."""
    return ctypes.c_float * count


def _exact(vector: Array) -> float:
    """The sum of the squares, in float64."""
    total = 0.0
    for start in range(0, len(vector), _WIDENED):
        wide = vector[start : start + _WIDENED].astype(np.float64)
        whole = len(wide) - len(wide) % _ROW
        if whole:
            total += float(np.add.reduce(_squares(wide[:whole].reshape(-1, _ROW))))
        rest = wide[whole:]
        total += float(rest.dot(rest))
    return total


def _verified(vectors: Sequence[Array]) -> float | None:
    """The sum of the squares at the speed of float32, or None if it is not accurate."""
    of_rows, chosen, rests, before = [], [], [], 0
    for vector in vectors:
        count = len(vector) // _ROW
        rows = vector[: count * _ROW].reshape(count, _ROW)
        of_rows.append(_squares(rows))
        chosen.append(rows[-before % _EVERY :: _EVERY])
        rests.append(vector[count * _ROW :])
        before += count
    together = np.concatenate(of_rows)
    whole = float(np.add.reduce(together, dtype=np.float64))
    sampled = sum(together[::_EVERY].tolist())
    exact = float(np.add.reduce(_squares(np.concatenate(chosen, dtype=np.float64))))
    if not is_accurate(whole, sampled, exact, before, _EVERY, 2):
        return None
    rest = np.concatenate(rests, dtype=np.float64)
    return whole + float(np.add.reduce(rest * rest))


def _squares(rows: Array) -> Array:
    """The sum of the squares of each row, in its dtype."""
    if hasattr(np, "vecdot"):
        sums: Array = np.vecdot(rows, rows)
    else:  # before NumPy 2.0
        sums = np.matmul(rows[:, None, :], rows[:, :, None]).reshape(-1)
    return sums
