"""Norms of the rows of matrices, norms of tensors in host memory piece by piece, and products of rows.

A piece of a tensor is a matrix with short rows.  It stays in the cache, and its copy in float64 does too.
How tensors are cut depends on their sizes alone, and a single thread adds a row.  So the bits of a norm do
not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from torchclip._core import memory
from torchclip._core.joint_norms import join_present, vector_norms
from torchclip._core.scalars import ABSENT, norm_dtype, vector

NARROW_REAL = frozenset({torch.float32, torch.float16, torch.bfloat16})
NARROW = NARROW_REAL | {torch.complex64, torch.complex32}
"""Dtypes whose squares fit into float64."""
FLOAT32_TINY = torch.finfo(torch.float32).tiny

_ROW = 1 << 10
# Torch splits no sum of this length over threads.
_SERIAL = (1 << 15) - 1


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to accumulate in: the widest that the device has."""
    wide = norm_dtype(tensor.device)
    if not tensor.is_complex():
        return wide
    return torch.complex64 if wide is torch.float32 else torch.complex128


def matrix_norms(rows: Tensor, p: float) -> Tensor:
    """The norms along the last axis in the widest dtype, without overflow or underflow on the way."""
    is_narrow, wide = rows.dtype in NARROW, wide_dtype(rows)
    if not is_narrow:
        rows = rows.to(wide)  # as vector_norm does not read float8
    if p != 2 and rows.is_complex():
        # For order 0, vector_norm reads only the real part of a single complex number.
        rows = rows.to(wide).abs()
        wide = rows.dtype
    plain = vector_norms(rows, p, wide)
    if (is_narrow and p in (1, 2) and wide in memory.DOUBLE) or p in (0, math.inf, -math.inf):
        return plain
    # If the powers of the results are in range, so are all others.
    regular = (plain > 0) & (abs(p) * plain.log().abs() < 600)
    if memory.on_host([rows]) and bool(regular.all()):
        return plain
    return join_present(rows.to(wide).abs(), p)


# Tensors in host memory


def norm_on_host(tensors: Iterable[Tensor], p: float) -> float:
    """The norm of all elements of strided tensors as one vector; ``ABSENT`` if there are none."""
    norms = _of_pieces(_pieces(tensors), p)
    if p == 0:
        return float(norms.sum()) if len(norms) else ABSENT  # numbers of elements, whose sum is exact
    while len(norms) > _ROW:
        norms = _of_pieces(memory.split(norms, memory.PIECE), p)
    if len(norms) < 2:
        return float(norms) if len(norms) else ABSENT
    return float(matrix_norms(norms.view(1, -1), p))


def _of_pieces(pieces: Iterable[Tensor], p: float) -> Tensor:
    """Norms of parts of vectors, whose joint norm is that of all elements."""
    norms = []
    for piece in pieces:
        # Long sums of numbers that are rounded in float64 lose digits.
        most = _SERIAL if piece.dtype in NARROW and p in (1, 2) else _ROW
        whole = len(piece) - len(piece) % _ROW if len(piece) > most else 0
        if whole:
            norms.append(matrix_norms(piece[:whole].view(-1, _ROW), p))
        if whole < len(piece):
            norms.append(matrix_norms(piece[None, whole:], p))
    return norms[0] if len(norms) == 1 else torch.cat(norms) if norms else vector([])


def _pieces(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The elements of tensors in vectors of at most ``PIECE`` elements; small tensors are joined."""
    few: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() > memory.JOINED:
            yield from memory.pieces(tensor)
        elif tensor.numel():
            few.setdefault(tensor.dtype, []).append(tensor)
    for small in few.values():
        most = memory.PIECE // memory.JOINED
        for start in range(0, len(small), most):
            yield memory.concatenate(small[start : start + most])


# Rows


def norms_of_rows(tensors: Sequence[Tensor], p: float) -> list[Tensor]:
    """The norms of the slices of each tensor along its first axis: float64, of shape ``(len(tensor),)``."""
    on_host = memory.on_host(tensors)
    return [_norms_of_rows(tensor, p, on_host) for tensor in tensors]


def _norms_of_rows(tensor: Tensor, p: float, on_host: bool) -> Tensor:
    if tensor.numel() == 0:
        return tensor.new_zeros(len(tensor), dtype=norm_dtype(tensor.device))
    rows = tensor if tensor.dim() == 2 else tensor.reshape(len(tensor), tensor.numel() // len(tensor))
    if not on_host or rows.numel() <= min(_SERIAL, memory.PIECE):
        return matrix_norms(rows, p)
    if rows.shape[1] > _SERIAL:
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
