"""Norms of order 1 and 2 of float32, float16 and bfloat16 numbers in host memory.

Their powers fit into float64, which takes three times as long as float32.  So many elements are summed in
float32 within short rows, and in float64 over the rows.  For most gradients the rows' rounding errors cancel
out (to some 1e-9).  If they do not, as for constant gradients, a few rows that are summed again show it.

NumPy sums few elements, which stay in the cache: its calls cost a fifth of torch's, and so few elements do
not need a second thread.  Torch sums more elements.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.linalg import vector_norm

from torchclip._core import memory

NARROW_REAL = frozenset({torch.float32, torch.float16, torch.bfloat16})
FEW = 1 << 19
"""The largest number of elements that NumPy sums."""
SERIAL = (1 << 15) - 1
"""Torch splits no reduction of this length over threads, so that results do not depend on their number."""

# From this many elements on, a verified float32 norm is cheaper than an exact one.
_LARGE = 1 << 16
# How many elements NumPy and torch convert at a time, so that they are still in the cache when they are read.
_WIDENED, _WIDENED_BY_TORCH = 1 << 14, 1 << 17
# NumPy's rows: so short that no BLAS splits them over threads.
_ROW = 1 << 9
# One row in this many is summed again, of few rows and of many: primes, unlike any usual width.
_EVERY = (47, 263)
_MANY_ROWS = 1 << 13

Array: TypeAlias = "npt.NDArray[np.floating[Any]]"


class _Library(NamedTuple):
    """What NumPy and torch do with vectors, and with the rows of matrices."""

    row: int
    """The number of elements in a row."""
    concatenate: Callable[[Sequence[Any]], Any]
    """Copies the elements of vectors or matrices into one vector, for ``exact``."""
    in_float32: Callable[[Sequence[Any], float], Array]
    """Sums the powers of each row of some matrices, in float32 within the row."""
    exact: Callable[[Any, float], float]
    """Sums the powers of a vector in float64."""


def norm_of_few(tensors: Sequence[Tensor], sizes: Sequence[int]) -> float:
    """The 2-norm of at most ``FEW`` elements; the tensors have one dtype by ``memory.common_dtype``."""
    with np.errstate(all="ignore"):  # no warning: what overflows float32 is computed again
        return _norm(_vectors(tensors, sizes), 2.0, _NUMPY)


def norm(vectors: Sequence[Tensor], p: float) -> float:
    """The norm of vectors."""
    return _norm(vectors, p, _TORCH)


def is_accurate(whole: float, sampled: float, exact: float, every: int, p: float) -> bool:
    """Whether a norm in range is accurate, of which parts are summed in float32.

    Args:
        whole: the norm.
        sampled: that of one part in ``every``.
        exact: the same, summed in float64.
        every: how many parts there are for each sampled one.
        p: the order.
    """
    # If the sampled parts are almost 0, they say nothing about the others.
    return 4 * every * exact**p > whole**p and abs(sampled - exact) <= 2e-8 * exact


def in_range(norm: float, parts: int) -> bool:
    """Whether a norm is far from both ends of the float32 range, where squares overflow or lose digits."""
    return 1e-15 * parts < norm < 1e15


def _norm(vectors: Sequence[Any], p: float, library: _Library) -> float:
    norm = _verified(vectors, p, library) if sum(map(len, vectors)) >= _LARGE else None
    return _root(sum(library.exact(vector, p) for vector in vectors), p) if norm is None else norm


def _verified(vectors: Sequence[Any], p: float, library: _Library) -> float | None:
    """The norm at the speed of float32, or None if it is not accurate."""
    length = library.row
    count = sum(len(vector) // length for vector in vectors)
    every = _EVERY[count >= _MANY_ROWS]
    matrices, chosen, rests, before = [], [], [], 0
    for vector in vectors:
        here = len(vector) // length
        rows = vector[: here * length].reshape(here, length)
        matrices.append(rows)
        chosen.append(rows[-before % every :: every])
        rests.append(vector[here * length :])
        before += here
    of_rows = library.in_float32(matrices, p)
    total = float(np.add.reduce(of_rows, dtype=np.float64))
    whole, sampled = _root(total, p), _root(sum(of_rows[::every].tolist()), p)
    exact = _root(library.exact(library.concatenate(chosen), p), p)
    if in_range(whole, count) and is_accurate(whole, sampled, exact, every, p):
        return _root(total + library.exact(library.concatenate(rests), p), p)
    return None


def _root(power: float, p: float) -> float:
    return math.sqrt(power) if p == 2 else power


# With NumPy


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


def _squares(rows: Array) -> Array:
    """The sum of the squares of each row, in its dtype."""
    if hasattr(np, "vecdot"):
        sums: Array = np.vecdot(rows, rows)
    else:  # before NumPy 2.0
        sums = np.matmul(rows[:, None, :], rows[:, :, None]).reshape(-1)
    return sums


def _exact_squares(vector: Array, p: float) -> float:
    total = 0.0
    for start in range(0, len(vector), _WIDENED):
        wide = vector[start : start + _WIDENED].astype(np.float64, copy=False)
        rest = len(wide) % _ROW
        if rest:
            total += float(wide[-rest:].dot(wide[-rest:]))
        if len(wide) > rest:
            total += float(np.add.reduce(_squares(wide[: len(wide) - rest].reshape(-1, _ROW))))
    return total


def _all_squares(matrices: Sequence[Array], p: float) -> Array:
    return np.concatenate([_squares(rows) for rows in matrices])


_NUMPY = _Library(_ROW, partial(np.concatenate, axis=None, dtype=np.float64), _all_squares, _exact_squares)


# With torch


def _powers(matrices: Sequence[Tensor], p: float) -> Array:
    return _of_norms([norms for rows in matrices for norms in _float32_norms(rows, p)], p)


def _float32_norms(rows: Tensor, p: float) -> list[Tensor]:
    if rows.dtype is torch.float32:
        return [vector_norm(rows, p, dim=1)]
    parts = memory.split(rows, _WIDENED_BY_TORCH // _TORCH.row)
    room = torch.empty_like(parts[0], dtype=torch.float32)
    wide = [room] * (len(parts) - 1) + [room[: parts[-1].shape[0]]]
    return [vector_norm(w.copy_(part), p, dim=1) for w, part in zip(wide, parts, strict=True)]


def _exact_powers(vector: Tensor, p: float) -> float:
    if len(vector) <= SERIAL:
        return float(vector_norm(vector, p, dtype=torch.float64) ** p)
    whole = len(vector) - len(vector) % _TORCH.row
    parts = [
        *memory.split(vector[:whole].view(-1, _TORCH.row), _WIDENED_BY_TORCH // _TORCH.row),
        vector[None, whole:],
    ]
    norms = [vector_norm(rows, p, dim=1, dtype=torch.float64) for rows in parts]
    return float(np.add.reduce(_of_norms(norms, p)))


def _of_norms(norms: Sequence[Tensor], p: float) -> Array:
    """The powers of norms."""
    together = norms[0] if len(norms) == 1 else memory.concatenate(norms)
    powers: Array = together.double().numpy()
    powers **= p
    return powers


_TORCH = _Library(1 << 8, memory.concatenate, _powers, _exact_powers)
