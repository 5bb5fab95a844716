"""Norms of tensors in host memory, of any dtype, layout and order, with torch operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torchclip._core import memory, narrow
from torchclip._core.joint_norms import join
from torchclip._core.rows import block_norms
from torchclip._core.scalars import ABSENT

# Pieces have at most that many elements, if no copy is made.
_LONG = 8 * memory.PIECE
# That many elements are processed together, some of them copies.
_TOGETHER = 4 * memory.PIECE


def norm(tensors: Sequence[Tensor], p: float) -> float:
    """The norm of all elements of the tensors as one vector."""
    parts: list[float] = []
    together: list[Tensor] = []
    elements = 0
    for piece in _pieces_of(tensors, p):
        if not _is_narrow(piece, p):
            parts.append(float(block_norms(piece.view(1, -1), p)))
            continue
        together.append(piece)
        elements += len(piece)
        if elements >= _TOGETHER:
            parts.append(narrow.norm(together, p))
            together, elements = [], 0
    if together:
        parts.append(narrow.norm(together, p))
    return float(join(parts, p))


def finite_norm(tensor: Tensor, p: float) -> float:
    """The norm of the finite elements of a tensor."""
    copy = tensor.detach().clone()  # one tensor at a time, so that there is never a second set of gradients
    if copy.layout == torch.sparse_coo:
        copy = copy.coalesce()
    values = memory.own_values(copy)
    finite = values.isfinite()
    if not bool(finite.any()):
        return ABSENT
    values.masked_fill_(~finite, 0)
    return norm([copy], p)


def _pieces_of(tensors: Sequence[Tensor], p: float) -> Iterator[Tensor]:
    """The elements of tensors in one-dimensional pieces of at most ``_LONG``, small tensors joined."""
    few: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        for values in (tensor,) if tensor.layout is torch.strided else memory.stored(tensor, p):
            size = values.numel()
            if size > memory.JOINED:
                yield from memory.pieces(values, _LONG if _is_narrow(values, p) else memory.PIECE)
            elif size:
                few.setdefault(values.dtype, []).append(values)
    for group in few.values():
        yield from _joined(group)


def _is_narrow(tensor: Tensor, p: float) -> bool:
    """Whether all powers fit into float64: those of orders 1 and 2, of real numbers shorter than that."""
    return p in (1, 2) and tensor.dtype in narrow.NARROW_REAL


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
