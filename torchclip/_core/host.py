"""Torch operations on tensors in host memory: what the kernel does not take, or everything without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from torchclip._core import changes, memory
from torchclip._core.batch import Facts, Norm, Norms
from torchclip._core.rows import FLOAT32_TINY, NARROW_REAL, STEP, matrix_norms
from torchclip._core.scalars import ABSENT, join

__all__ = ["SMALL", "HostBatch", "facts_of"]

SMALL = 1 << 19
"""So many elements are multiplied sooner, in the cache, than a fused step does it."""

_flatten: Callable[[Sequence[Tensor]], Tensor] = torch._utils._flatten_dense_tensors

# Torch splits no reduction of this length over threads, which would make results depend on their number.
_SERIAL = (1 << 15) - 1
_ROW = 1 << 10
# Below this size a tensor's own call costs more than copying it beside others.
_JOINED = 1 << 14
# From so many elements on a float32 norm that has to be verified is cheaper than an exact one.
_LARGE = 1 << 16
# Of those so many can be looked at in one go: no copy is made, and their rows have at most _SERIAL norms.
_LONG_PIECE = 128 * _SERIAL


def facts_of(tensors: Sequence[Tensor], shared: bool) -> int:
    """``Facts`` of tensors that torch operations work on; these are never small (see ``SMALL``)."""
    facts = Facts.SHARED if shared else 0
    dtypes = {tensor.dtype for tensor in tensors}
    if not dtypes.isdisjoint(memory.DOUBLE):
        facts |= Facts.DOUBLE
    if any(dtype.is_complex for dtype in dtypes):
        facts |= Facts.COMPLEX
    for tensor in tensors:
        if tensor.layout is torch.strided and not memory.fills_its_memory(tensor):
            facts |= Facts.GAPS
            break
    return facts


class HostBatch:
    """Distinct tensors in host memory, of any dtype and layout; a ``Batch``.

    Args:
        tensors: the tensors.
        shared: whether any of them is the gradient of several parameters.
    """

    def __init__(self, tensors: list[Tensor], shared: bool = False) -> None:
        self.all = tensors
        self._shared = shared

    @property
    def facts(self) -> int:
        """``Facts`` of the tensors."""
        return facts_of(self.all, self._shared)

    def norm(self, p: float, finite: bool = False, /) -> Norm:
        """The norm of all elements, or of the finite ones, as one vector."""
        if finite:
            return join(self.norms(p, True), p)
        with torch.no_grad():
            return _norm(self.all, p)

    def norms(self, p: float, finite: bool = False, /) -> Norms:
        """The norm of each tensor."""
        with torch.no_grad():
            return [_finite_norm(tensor, p) if finite else _norm([tensor], p) for tensor in self.all]

    def scale_(self, clip_coef: Norm, /) -> None:
        """Multiply every element in place."""
        clip_coef = float(clip_coef)
        if clip_coef != 1.0:
            _scale_(self.all, clip_coef)

    def scale_each_(self, clip_coefs: Norms, /) -> None:
        """Multiply each tensor in place by its own number."""
        for tensor, clip_coef in zip(self.all, _numbers(clip_coefs), strict=True):
            if clip_coef != 1.0:
                _scale_([tensor], clip_coef)

    def clamp_(self, limit: float, /) -> None:
        """Limit every element in place to ``[-limit, limit]``."""
        together, alone = changes.parted(self.all)
        with torch.no_grad():
            for (dtype, _), group in together.items():
                small = [tensor for tensor in group if tensor.numel() <= _JOINED]
                if small:
                    within = changes.limit_within(dtype, limit)
                    torch._foreach_clamp_max_(small, within)
                    torch._foreach_clamp_min_(small, -within)
                alone += [tensor for tensor in group if tensor.numel() > _JOINED]
        changes.clamp_elements_(alone, limit)

    def zero_nonfinite_(self) -> None:
        """Put 0 in the place of every infinite or NaN element."""
        changes.zero_nonfinite_(self.all)


def _numbers(clip_coefs: Norms) -> list[float]:
    return clip_coefs.tolist() if isinstance(clip_coefs, Tensor) else clip_coefs


def _scale_(tensors: Sequence[Tensor], clip_coef: float) -> None:
    """Multiply every tensor in place; each product is formed in at least float32, then rounded."""
    if 0 < clip_coef < FLOAT32_TINY:
        _scale_(tensors, STEP)
        _scale_(tensors, clip_coef / STEP)
        return
    with torch.no_grad():
        together, alone = changes.parted(tensors)
        for tensor in alone:
            changes.scale_alone_(tensor, clip_coef)
        for (dtype, device), group in together.items():
            if dtype in (torch.float32, torch.float64):
                # Of a number torch would make a tensor again for each of the group.
                torch._foreach_mul_(group, torch.scalar_tensor(clip_coef, dtype=dtype, device=device))
                continue
            # Multiplied together, they would round the number to their own low precision, by up to 0.4 %.
            for tensor in group:
                tensor.mul_(clip_coef)


# Norms


def _finite_norm(tensor: Tensor, p: float) -> float:
    copy = tensor.detach().clone()  # of one at a time, so that there is never a second set of them
    if copy.layout == torch.sparse_coo:
        copy = copy.coalesce()
    values = memory.own_values(copy) if copy.layout in memory.SPARSE else copy
    finite = values.isfinite()
    if not bool(finite.any()):
        return ABSENT
    values.masked_fill_(~finite, 0)
    return _norm([copy], p)


def _norm(tensors: Sequence[Tensor], p: float) -> float:
    parts: list[float] = []
    of_rows: list[Tensor] = []
    narrow: list[Tensor] = []
    elements = 0
    for piece in _pieces_of(tensors, p):
        if not _is_narrow(piece, p):
            parts += _piece_norms(piece, p)
            continue
        # Some may be copies, so that not all are kept until the end.
        narrow.append(piece)
        elements += len(piece)
        if elements >= memory.PIECE:
            of_rows += _narrow_norms(narrow, p)
            narrow, elements = [], 0
    if narrow:
        of_rows += _narrow_norms(narrow, p)
    if of_rows:
        joined = of_rows[0] if len(of_rows) == 1 else torch.cat(of_rows)
        parts += [float(vector_norm(some, p)) for some in memory.split(joined, _SERIAL)]
    return float(join(parts, p))


def _pieces_of(tensors: Sequence[Tensor], p: float) -> Iterator[Tensor]:
    """The elements of tensors in one-dimensional pieces of at most ``_LONG_PIECE``, small tensors joined."""
    small: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        for values in (tensor,) if tensor.layout is torch.strided else memory.stored(tensor, p):
            size = values.numel()
            if size > _JOINED:
                yield from memory.pieces(values, _LONG_PIECE if _is_narrow(values, p) else memory.PIECE)
            elif size:
                small.setdefault(values.dtype, []).append(values)
    for group in small.values():
        yield from _joined(group)


def _piece_norms(piece: Tensor, p: float) -> list[float]:
    """Norms of the parts of a one-dimensional tensor of at most ``PIECE`` elements."""
    norms: list[float] = torch.cat([matrix_norms(rows, p) for rows in _rows(piece, _ROW)]).tolist()
    return norms


def _rows(piece: Tensor, length: int) -> list[Tensor]:
    """A one-dimensional tensor as a matrix of rows of some length, and one of a single row with the rest."""
    whole = len(piece) - len(piece) % length
    return [part for part in (piece[:whole].view(-1, length), piece[whole:].view(1, -1)) if part.numel()]


def _is_narrow(tensor: Tensor, p: float) -> bool:
    """Whether no power leaves the range of float64: of the orders 1 and 2, and shorter real numbers."""
    return p in (1, 2) and tensor.dtype in NARROW_REAL


def _narrow_norms(pieces: Sequence[Tensor], p: float) -> list[Tensor]:
    """Float64 norms of the parts of narrow pieces."""
    long = [piece for piece in pieces if len(piece) > _JOINED]
    norms = [
        vector_norm(piece, p, dim=0, keepdim=True, dtype=torch.float64)
        for piece in pieces
        if len(piece) <= _JOINED
    ]
    verified = None
    if sum(map(len, long)) >= _LARGE:
        verified = _verified_float32_norms(long, p)
    if verified is not None:
        return norms + verified
    return norms + [
        vector_norm(rows, p, dim=1, dtype=torch.float64)
        for piece in long
        for part in memory.split(piece, memory.PIECE)
        for rows in _rows(part, _ROW)
    ]


def _verified_float32_norms(pieces: Sequence[Tensor], p: float) -> list[Tensor] | None:
    """Norms of the parts of pieces at the speed of float32, or None where they are not accurate.

    Rows of 128 are summed in float32 and joined in float64.  On most gradients the rows' rounding errors
    cancel out (to some 1e-9); where they do not, as for constant ones, every 67th row, done again in float64,
    shows it: 67 is in step with no usual width of a matrix.
    """
    matrices = [piece.unfold(0, 128, 128) for piece in pieces]
    of_rows = [vector_norm(rows, p, dim=1, dtype=torch.float32) for rows in matrices]
    of_whole = vector_norm(_together(of_rows).double(), p)
    exact_rows = [vector_norm(rows[::67], p, dim=1, dtype=torch.float64) for rows in matrices]
    sampled, exact, whole = torch.stack(
        [
            vector_norm(_together([norms[::67] for norms in of_rows]).double(), p),
            vector_norm(_together(exact_rows), p),
            of_whole,
        ]
    ).tolist()
    # Far from both ends of the float32 range, where squares overflow or lose their digits.
    in_range = 1e-15 * sum(map(len, of_rows)) < whole < 1e15
    # Next to nothing in the rows looked at says nothing about the others.
    telling = exact**p > whole**p / 256
    if not (in_range and telling and abs(sampled - exact) <= 2e-8 * exact):
        return None
    rests = [piece[-(len(piece) % 128) :] for piece in pieces if len(piece) % 128]
    if not rests:
        return [of_whole.view(1)]
    return [of_whole.view(1), vector_norm(_together(rests), p, dim=0, keepdim=True, dtype=torch.float64)]


def _together(vectors: Sequence[Tensor]) -> Tensor:
    return vectors[0] if len(vectors) == 1 else _beside(vectors)


def _joined(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Small tensors of one dtype, copied beside each other into pieces of at most ``PIECE`` elements."""
    group: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if size + tensor.numel() > memory.PIECE:
            yield _beside(group)
            group, size = [], 0
        group.append(tensor)
        size += tensor.numel()
    yield _beside(group)


def _beside(tensors: Sequence[Tensor]) -> Tensor:
    # Autocast meddles with all that concatenates: it refuses float16 where it is about bfloat16.
    with torch._C._DisableAutocast():
        return _flatten(tensors)
