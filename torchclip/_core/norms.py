"""Norms of tensors in host memory, of any dtype, layout and order, with torch operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from torchclip._core import memory, small
from torchclip._core.joint_norms import join
from torchclip._core.rows import NARROW_REAL, matrix_norms
from torchclip._core.scalars import ABSENT

# Torch does not split reductions of this length over threads, so results do not depend on their number.
_SERIAL = (1 << 15) - 1
_ROW = 1 << 10
# The number of elements in a row that is summed in float32.
_SHORT_ROW = 1 << 8
# One row in this many is summed again, of few rows and of many: primes, unlike any usual width.
_EVERY = (67, 263)
_MANY_ROWS = 1 << 14
# From this many elements on, a verified float32 norm is cheaper than an exact one.
_LARGE = 1 << 16
# That many of these are processed at a time: no copy is made, and their rows have at most _SERIAL norms.
_LONG_PIECE = _SHORT_ROW * _SERIAL
# That many are processed together, some of them copies.
_TOGETHER = 4 * memory.PIECE
# That many are converted at a time, so that they are still in the cache when they are read again.
_WIDENED = 1 << 17


def norm(tensors: Sequence[Tensor], p: float) -> float:
    """The norm of all elements of the tensors as one vector."""
    parts: list[float] = []
    of_rows: list[Tensor] = []
    narrow: list[Tensor] = []
    elements = 0
    for piece in _pieces_of(tensors, p):
        if not _is_narrow(piece, p):
            parts += torch.cat([matrix_norms(rows, p) for rows in _rows(piece, _ROW)]).tolist()
            continue
        narrow.append(piece)
        elements += piece.numel()
        if elements >= _TOGETHER:
            of_rows += _narrow_norms(narrow, p)
            narrow, elements = [], 0
    if narrow:
        of_rows += _narrow_norms(narrow, p)
    if of_rows:
        joined = of_rows[0] if len(of_rows) == 1 else torch.cat(of_rows)
        parts += [float(vector_norm(some, p)) for some in memory.split(joined, _SERIAL)]
    return float(join(parts, p))


def finite_norm(tensor: Tensor, p: float) -> float:
    """The norm of the finite elements of a tensor."""
    copy = tensor.detach().clone()  # one tensor at a time, so that there is never a second set of gradients
    if copy.layout == torch.sparse_coo:
        copy = copy.coalesce()
    values = memory.own_values(copy) if copy.layout in memory.SPARSE else copy
    finite = values.isfinite()
    if not bool(finite.any()):
        return ABSENT
    values.masked_fill_(~finite, 0)
    return norm([copy], p)


def _pieces_of(tensors: Sequence[Tensor], p: float) -> Iterator[Tensor]:
    """The elements of tensors in one-dimensional pieces of at most ``_LONG_PIECE``, small tensors joined."""
    few: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        for values in (tensor,) if tensor.layout is torch.strided else memory.stored(tensor, p):
            size = values.numel()
            if size > memory.JOINED:
                yield from memory.pieces(values, _LONG_PIECE if _is_narrow(values, p) else memory.PIECE)
            elif size:
                few.setdefault(values.dtype, []).append(values)
    for group in few.values():
        yield from _joined(group)


def _rows(piece: Tensor, length: int) -> list[Tensor]:
    """A one-dimensional tensor as a matrix with rows of some length, and a single row with the rest."""
    whole = piece.numel() - piece.numel() % length
    return [part for part in (piece[:whole].view(-1, length), piece[whole:].view(1, -1)) if part.numel()]


def _is_narrow(tensor: Tensor, p: float) -> bool:
    """Whether all powers fit into float64: those of orders 1 and 2, of real numbers shorter than that."""
    return p in (1, 2) and tensor.dtype in NARROW_REAL


def _narrow_norms(pieces: Sequence[Tensor], p: float) -> list[Tensor]:
    """Float64 norms of the parts of pieces that are narrower than float64."""
    long = [piece for piece in pieces if piece.numel() > memory.JOINED]
    norms = [
        vector_norm(piece, p, dim=0, keepdim=True, dtype=torch.float64)
        for piece in pieces
        if piece.numel() <= memory.JOINED
    ]
    verified = None
    if sum(piece.numel() for piece in long) >= _LARGE:
        verified = _verified_float32_norms(long, p)
    if verified is not None:
        return norms + verified
    return norms + [
        vector_norm(rows, p, dim=1, dtype=torch.float64)
        for piece in long
        for part in memory.split(piece, _WIDENED)
        for rows in _rows(part, _ROW)
    ]


def _verified_float32_norms(pieces: Sequence[Tensor], p: float) -> list[Tensor] | None:
    """Norms of the parts of pieces at the speed of float32, or None if these are not accurate.

    Short rows are summed in float32 and joined in float64.
    """
    matrices = [piece.unfold(0, _SHORT_ROW, _SHORT_ROW) for piece in pieces]
    of_rows = [_float32_norms(rows, p) for rows in matrices]
    of_whole = vector_norm(memory.concatenate(of_rows).double(), p)
    count = sum(norms.numel() for norms in of_rows)
    every = _EVERY[count >= _MANY_ROWS]
    exact_rows = [vector_norm(rows[::every], p, dim=1, dtype=torch.float64) for rows in matrices]
    sampled = vector_norm(memory.concatenate([norms[::every] for norms in of_rows]).double(), p)
    exact = vector_norm(memory.concatenate(exact_rows), p)
    whole_power, sampled_power, exact_power = (float(norm) ** p for norm in (of_whole, sampled, exact))
    if not small.is_accurate(whole_power, sampled_power, exact_power, count, every, p):
        return None
    rests = [piece[-(piece.numel() % _SHORT_ROW) :] for piece in pieces if piece.numel() % _SHORT_ROW]
    if not rests:
        return [of_whole.view(1)]
    return [
        of_whole.view(1),
        vector_norm(memory.concatenate(rests), p, dim=0, keepdim=True, dtype=torch.float64),
    ]


def _float32_norms(rows: Tensor, p: float) -> Tensor:
    """The norms of rows, in float32."""
    if rows.dtype is torch.float32:
        of_float32: Tensor = vector_norm(rows, p, dim=1)
        return of_float32
    parts = memory.split(rows, _WIDENED // _SHORT_ROW)
    room = torch.empty_like(parts[0], dtype=torch.float32)
    wide = [room] * (len(parts) - 1) + [room[: parts[-1].shape[0]]]
    return memory.concatenate(
        [vector_norm(copy.copy_(part), p, dim=1) for copy, part in zip(wide, parts, strict=True)]
    )


def _joined(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Small tensors of one dtype, copied next to each other into pieces of at most ``PIECE`` elements."""
    group: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if size + tensor.numel() > memory.PIECE:
            yield memory.concatenate(group)
            group, size = [], 0
        group.append(tensor)
        size += tensor.numel()
    yield memory.concatenate(group)
