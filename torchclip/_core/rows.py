"""Norms of the rows of matrices, norms of tensors in host memory piece by piece, and products of rows.

A piece of a tensor is a matrix with short rows.  It stays in the cache, and its copy in float64 does too.
How tensors are cut depends on their sizes alone, and a single thread adds a row.  So the bits of a norm do
not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from torchclip._core import memory
from torchclip._core.joint_norms import join_present, vector_norms
from torchclip._core.scalars import ABSENT, norm_dtype, vector

NARROW_REAL = frozenset({torch.float32, torch.float16, torch.bfloat16})
FLOAT32_TINY = torch.finfo(torch.float32).tiny

# Numbers below the first are multiplied by the second, a power of two.
_SMALL, _LARGE = 1e-200, 2.0**600
_NARROW = NARROW_REAL | {torch.complex64, torch.complex32}
_ROW = 1 << 10
SERIAL = (1 << 15) - 1
"""Torch splits no sum of this length over threads."""
# Up to this size, calls for a single tensor cost more than copying it next to others.
_JOINED = 1 << 16


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to accumulate in: the widest that the device has."""
    wide = norm_dtype(tensor.device)
    if not tensor.is_complex():
        return wide
    return torch.complex64 if wide is torch.float32 else torch.complex128


def powers_fit(dtype: torch.dtype, device: torch.device, p: float) -> bool:
    """Whether the sum of all powers stays in the range of the dtype in which norms are accumulated."""
    if p in (0, 1, math.inf, -math.inf):
        return True
    in_double = norm_dtype(device) is torch.float64
    return p == 2 and (dtype is torch.float16 or (in_double and dtype in _NARROW))


def matrix_norms(rows: Tensor, p: float, fit: bool = False) -> Tensor:
    """The norms along the last axis in the widest dtype, without overflow or underflow on the way.

    Args:
        rows: a matrix.
        p: the order.
        fit: whether the powers are known to stay in range.
    """
    fit = fit or powers_fit(rows.dtype, rows.device, p)
    # For order 0, vector_norm reads only the real part of a single complex number.
    if rows.is_complex() and (p != 2 or not fit):
        magnitudes, factors = _magnitudes(rows, p)
        return matrix_norms(magnitudes, p, fit) / factors
    wide = wide_dtype(rows)
    if rows.dtype not in _NARROW:
        rows = rows.to(wide)  # as vector_norm does not read float8
    plain = vector_norms(rows, p, wide)
    if fit:
        return plain
    # If the powers of the results are in range, so are all others.
    regular = (plain > 0) & (abs(p) * plain.log().abs() < 600)
    if memory.on_host([rows]) and bool(regular.all()):
        return plain
    return join_present(rows.to(wide).abs(), p)


def _magnitudes(rows: Tensor, p: float) -> tuple[Tensor, Tensor | float]:
    """The magnitudes of complex numbers, and what those of each row were multiplied by.

    A magnitude that float64 has with few digits would be rounded before it is added to others.
    """
    rows = rows.to(wide_dtype(rows))
    if p == 0 or rows.dtype is not torch.complex128:
        return rows.abs(), 1.0
    largest = torch.maximum(rows.real.abs().amax(dim=1), rows.imag.abs().amax(dim=1))
    factors = torch.ones_like(largest).masked_fill(largest < _SMALL, _LARGE)
    return (rows * factors.unsqueeze(1)).abs(), factors


# Tensors in host memory


def norm_on_host(tensors: Sequence[Tensor], p: float) -> float:
    """The norm of all elements of strided tensors of one dtype; ``ABSENT`` if there are none."""
    norms = [of_rows for piece in _pieces(tensors) for of_rows in _norms_of_piece(piece, p)]
    if not norms:
        return ABSENT
    together = norms[0] if len(norms) == 1 else torch.cat(norms)
    if p == 0:
        return float(together.sum())  # numbers of elements, whose sum is exact
    fit = powers_fit(tensors[0].dtype, tensors[0].device, p)
    while together.numel() > _ROW:
        together = torch.cat(_norms_of_piece(together, p, fit))
    return float(together if together.numel() == 1 else matrix_norms(together.view(1, -1), p, fit))


def _norms_of_piece(piece: Tensor, p: float, fit: bool = False) -> list[Tensor]:
    """Norms of parts of a vector, whose joint norm is that of the vector."""
    size = piece.numel()
    # Numbers of up to 32 bits lose no digits in long sums of float64.
    if size <= (SERIAL if piece.dtype in _NARROW else _ROW):
        return [matrix_norms(piece.view(1, size), p, fit)]
    row = _row_length(size)
    rest = size % row
    norms = [matrix_norms(piece[: size - rest].view(-1, row), p, fit)]
    return [*norms, matrix_norms(piece[None, size - rest :], p, fit)] if rest else norms


@lru_cache(1 << 10)
def _row_length(size: int) -> int:
    """The longest length of rows, up to ``_ROW``, that divides the size; ``_ROW`` if only short ones do."""
    return next((length for length in range(_ROW, _ROW // 4, -1) if size % length == 0), _ROW)


def _pieces(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The elements of tensors in vectors of at most ``PIECE`` elements; small tensors are joined."""
    small: list[Tensor] = []
    together = 0
    for tensor in tensors:
        size = tensor.numel()
        if size > _JOINED:
            yield from memory.pieces(tensor)
        elif size:
            if together + size > memory.PIECE:
                yield memory.concatenate(small)
                small, together = [], 0
            small.append(tensor)
            together += size
    if small:
        yield memory.concatenate(small)


# Rows


def norms_of_rows(tensors: Sequence[Tensor], p: float) -> list[Tensor]:
    """The norms of the slices of each tensor along its first axis: float64, of shape ``(len(tensor),)``."""
    on_host = memory.on_host(tensors)
    return [_norms_of_rows(tensor, p, on_host) for tensor in tensors]


def _norms_of_rows(tensor: Tensor, p: float, on_host: bool) -> Tensor:
    if tensor.numel() == 0:
        return tensor.new_zeros(len(tensor), dtype=norm_dtype(tensor.device))
    rows = tensor if tensor.dim() == 2 else tensor.reshape(len(tensor), tensor.numel() // len(tensor))
    if not on_host or rows.numel() <= min(SERIAL, memory.PIECE):
        return matrix_norms(rows, p)
    if rows.shape[1] > SERIAL:
        return vector([norm_on_host([row], p) for row in rows])
    return torch.cat([matrix_norms(part, p) for part in memory.by_rows(rows)])


def scale_rows_(tensor: Tensor, clip_coefs: Tensor) -> None:
    """Multiply each slice along the first axis in place by its own number, from ``coefs_for``."""
    real = memory.as_real(tensor)
    if real.dtype in memory.DOUBLE:
        clip_coefs = clip_coefs.to(torch.float64)
    clip_coefs = clip_coefs.view(-1, *[1] * (real.dim() - 1))
    if clip_coefs.dtype == real.dtype or real.dtype.is_complex:
        real.mul_(clip_coefs)
        return
    # Torch would convert the whole tensor at once.
    parts = memory.by_rows(real)
    for part, of_part in zip(parts, torch.split(clip_coefs, max(1, len(parts[0]))), strict=True):
        part.mul_(of_part)


def coefs_for(dtype: torch.dtype, clip_coefs: Tensor) -> Tensor:
    """Float64 numbers in the dtype to multiply in: float32, if it has all their digits."""
    tiny = (clip_coefs > 0) & (clip_coefs < FLOAT32_TINY)
    if dtype in memory.DOUBLE or (memory.on_host((clip_coefs,)) and bool(tiny.any())):
        return clip_coefs
    return clip_coefs.to(torch.float32)
