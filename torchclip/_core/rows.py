"""Norms of the rows of matrices, and multiplication of each row by its own number."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchclip._core import memory, narrow
from torchclip._core.joint_norms import join_present, join_rows, vector_norms
from torchclip._core.scalars import norm_dtype

NARROW = narrow.NARROW_REAL | {torch.complex64, torch.complex32}
"""Dtypes whose squares fit into float64."""
FLOAT32_TINY = torch.finfo(torch.float32).tiny

_ROW = 1 << 10
# From this many elements on, verified float32 norms are cheaper than exact ones.
_MANY = 1 << 17
# The largest number of elements that are summed in float32.
_PART = 1 << 8
# One row in this many is summed again.
_EVERY = 47


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


def norms_of_rows(tensors: Sequence[Tensor], p: float) -> list[Tensor]:
    """The norms of the slices of each tensor along its first axis: float64, of shape ``(len(tensor),)``."""
    readable = memory.on_host(tensors)
    return [_row_norms(tensor, p, readable) for tensor in tensors]


def _row_norms(tensor: Tensor, p: float, readable: bool) -> Tensor:
    elements = tensor.numel()
    if elements == 0:
        return tensor.new_zeros(len(tensor), dtype=norm_dtype(tensor.device))
    rows, columns = tensor.shape[0], elements // tensor.shape[0]
    matrix = tensor if tensor.dim() == 2 else tensor.reshape(rows, columns)
    if readable and elements >= _MANY and p in (1, 2):
        fast = _verified_norms(matrix, p)
        if fast is not None:
            return fast
    if columns <= narrow.SERIAL or not tensor.is_cpu:
        # On a device each operation takes its time, and no threads split a row.
        if elements <= memory.PIECE or not readable:
            return matrix_norms(matrix, p)
        return torch.cat([matrix_norms(part, p) for part in memory.by_rows(matrix)])
    blocks = torch.split(matrix, max(1, memory.PIECE // columns))
    parts = [
        torch.stack([block_norms(b, p) for b in torch.split(block, memory.PIECE, dim=1)], -1)
        for block in blocks
    ]
    return torch.cat([join_rows(part, p) for part in parts])


def _verified_norms(rows: Tensor, p: float) -> Tensor | None:
    """The norms of many rows at the speed of float32, or None if these are not accurate.

    Short parts of rows are summed in float32 and joined in float64.  Some rows are summed in float64 too:
    rounding errors usually cancel out, and if they do not, these rows show it.
    """
    count, columns = rows.shape
    length = next((n for n in range(min(_PART, columns), _PART // 4, -1) if columns % n == 0), None)
    if rows.dtype is not torch.float32 or length is None or columns > length * narrow.SERIAL:
        return None
    parts = rows.view(count, -1, length)
    of_parts = vector_norms(parts, p)
    if not all(narrow.in_range(float(norm), 1) for norm in of_parts.aminmax()):
        return None
    chosen = (slice(None, None, _EVERY),) if count >= _EVERY else (slice(None), slice(None, None, _EVERY))
    # In proportion to the exact norms, so that each part counts alike.
    sampled = (of_parts[chosen] / vector_norms(parts[chosen], p, torch.float64)).mean()
    if not narrow.is_accurate(1.0, float(sampled), 1.0, _EVERY, p):
        return None
    return vector_norms(of_parts, p, torch.float64)


def block_norms(rows: Tensor, p: float) -> Tensor:
    """The norms of the rows of a matrix of about ``PIECE`` elements, whatever the number of threads."""
    whole = rows.shape[1] - rows.shape[1] % _ROW
    pieces = (rows[:, :whole].reshape(len(rows), -1, _ROW), rows[:, None, whole:])
    return join_rows(torch.cat([matrix_norms(n, p) for n in pieces if n.numel()], dim=1), p)


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
