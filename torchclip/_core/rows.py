"""Norms of the rows of matrices, and rows multiplied each by its own number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchclip._core import memory
from torchclip._core.scalars import join_rows, norm_dtype, vector_norms

__all__ = [
    "FLOAT32_TINY",
    "NARROW",
    "NARROW_REAL",
    "PRESCALE",
    "_wide_dtype",
    "matrix_norms",
    "row_norms",
    "scale_rows_",
]

NARROW_REAL = frozenset({torch.float32, torch.float16, torch.bfloat16})
NARROW = NARROW_REAL | {torch.complex64, torch.complex32}
"""Dtypes whose squares float64 holds."""
FLOAT32_TINY = torch.finfo(torch.float32).tiny
PRESCALE = 2.0**-64
"""A power of two, which rounds nothing: it takes numbers too small for float32 part of the way."""

_ROW = 1 << 10


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to accumulate in: the widest that the device has."""
    wide = norm_dtype(tensor.device)
    if not tensor.is_complex():
        return wide
    return torch.complex64 if wide is torch.float32 else torch.complex128


def matrix_norms(rows: Tensor, p: float) -> Tensor:
    """The norms along the last axis in the widest dtype, without overflow or underflow on the way."""
    narrow, wide = rows.dtype in NARROW, _wide_dtype(rows)
    if not narrow:
        rows = rows.to(wide)  # as vector_norm does not read float8
    if rows.is_complex() and p != 2:
        # Of a single complex number vector_norm looks at the real part only, for order 0.
        rows = rows.to(wide).abs()
        wide = rows.dtype
    plain = vector_norms(rows, p, wide)
    if p in (0, math.inf, -math.inf) or (p in (1, 2) and narrow and wide in memory.DOUBLE):
        return plain
    # The powers are in range if those of the results are.
    regular = (plain > 0) & (abs(p) * plain.log().abs() < 600)
    if memory.on_host([rows]) and bool(regular.all()):
        return plain
    magnitudes = rows.to(wide).abs()
    leading = magnitudes.amax(dim=-1) if p > 0 else magnitudes.amin(dim=-1)
    usable = (leading > 0) & leading.isfinite()
    divisor = torch.where(usable, leading, 1.0)
    scaled = vector_norms(magnitudes / divisor.unsqueeze(-1), p) * divisor
    return torch.where(usable, scaled, leading)


def row_norms(tensor: Tensor, p: float) -> Tensor:
    """The norms of the slices of a tensor along its first axis: float64, of shape ``(len(tensor),)``."""
    columns = math.prod(tensor.shape[1:])
    rows = tensor.reshape(len(tensor), columns)
    if rows.numel() == 0:
        return tensor.new_zeros(len(tensor), dtype=norm_dtype(tensor.device))
    blocks = torch.split(rows, max(1, memory.PIECE // columns))
    parts = [
        torch.stack([_block_norms(b, p) for b in torch.split(block, memory.PIECE, dim=1)], -1)
        for block in blocks
    ]
    return torch.cat([join_rows(part, p) for part in parts])


def _block_norms(rows: Tensor, p: float) -> Tensor:
    """The norms of the rows of a matrix of about ``PIECE`` elements, whatever the number of threads."""
    whole = rows.shape[1] - rows.shape[1] % _ROW
    pieces = (rows[:, :whole].reshape(len(rows), -1, _ROW), rows[:, None, whole:])
    return join_rows(torch.cat([matrix_norms(n, p) for n in pieces if n.numel()], dim=1), p)


def scale_rows_(tensor: Tensor, clip_coefs: Tensor) -> None:
    """Multiply each slice along the first axis in place by its own float64 number."""
    real = tensor
    # Where operations are intercepted a tensor may stand for its conjugate, which cannot be seen.
    if tensor.is_complex() and not memory.values_hidden():
        real = torch.view_as_real(memory.without_conj(tensor))
    wide = torch.float64 if real.dtype in memory.DOUBLE or _has_tiny(clip_coefs) else torch.float32
    clip_coefs = clip_coefs.to(wide).view(-1, *[1] * (real.dim() - 1))
    if clip_coefs.dtype == real.dtype or real.is_complex():
        real.mul_(clip_coefs)
        return
    # Torch would widen the whole tensor at once.
    parts = memory.by_rows(real)
    for part, of_part in zip(parts, torch.split(clip_coefs, max(1, len(parts[0]))), strict=True):
        part.mul_(of_part)


def _has_tiny(clip_coefs: Tensor) -> bool:
    """Whether float32 has not all digits of one of the numbers; numbers on a device are not asked."""
    tiny = (clip_coefs > 0) & (clip_coefs < FLOAT32_TINY)
    return memory.on_host([clip_coefs]) and bool(tiny.any())
