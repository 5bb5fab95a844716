"""The two primitives in torch operations, for every tensor that the CPU kernel does not take.

Tensors in CPU memory give norms as floats.  Tensors elsewhere, and all of them while operations are being
recorded (``torch.compile``), give 0-dim float64 tensors: nothing waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from torchclip._core.combine import combine, combine_tensors, norm_dtype

__all__ = [
    "SPARSE",
    "clamp_",
    "fills_its_memory",
    "norm",
    "norms",
    "on_host",
    "own_values",
    "recorded",
    "row_norms",
    "scale_",
    "scale_rows_",
    "traced",
    "zero_nonfinite_",
]

_flatten: Callable[[Sequence[Tensor]], Tensor] = torch._utils._flatten_dense_tensors
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack

# Elements looked at in one go, so that what is allocated on the way does not grow with the gradients.
_PIECE = 1 << 20
# Torch splits no reduction of this length over threads, which would make results depend on their number.
_SERIAL = (1 << 15) - 1
_ROW = 1 << 10
# Below this size a tensor's own call costs more than copying it beside others.
_SMALL = 1 << 14
# From this size on a float32 norm that has to be verified is cheaper than an exact one.
_LARGE = 1 << 18
# Of those so many can be looked at in one go: no copy is made, and their rows have at most _SERIAL norms.
_LONG_PIECE = 128 * _SERIAL


def recorded() -> bool:
    """Whether operations are being compiled or intercepted, so that all have to be torch's."""
    return _is_compiling() or _dispatch_modes() > 0


def traced() -> bool:
    """Whether no value may be looked at: operations are recorded, or inside a transform as ``vmap``."""
    return recorded() or torch._C._functorch.maybe_current_level() is not None


def on_host(tensors: Sequence[Tensor]) -> bool:
    """Whether values can be looked at without waiting for a device."""
    if traced():
        return False
    for tensor in tensors:  # noqa: SIM110 - all() takes three times as long
        if not tensor.is_cpu:
            return False
    return True


# Norms


def norm(tensors: Sequence[Tensor], p: float) -> float | Tensor:
    """The norm of order ``p`` of all the tensors' elements as one vector."""
    with torch.no_grad():
        if on_host(tensors):
            return _host_norm(tensors, p)
        device = tensors[0].device
        parts = [_device_norm(t, p).to(device) for t in tensors if t.numel()]
        return (
            combine_tensors(torch.stack(parts), p)
            if parts
            else tensors[0].new_zeros((), dtype=_wide(tensors[0]))
        )


def norms(tensors: Sequence[Tensor], p: float) -> list[float | Tensor]:
    """The norm of each tensor on its own, in order."""
    return [norm([t], p) for t in tensors]


def row_norms(tensor: Tensor, p: float) -> Tensor:
    """The norms of the slices of a tensor along its first axis: float64, of shape ``(len(tensor),)``."""
    columns = math.prod(tensor.shape[1:])
    rows = tensor.reshape(len(tensor), columns)
    if rows.numel() == 0:
        return tensor.new_zeros(len(tensor), dtype=norm_dtype(tensor.device))
    blocks = torch.split(rows, max(1, _PIECE // columns))
    parts = [
        torch.stack([_block_norms(b, p) for b in torch.split(block, _PIECE, dim=1)], -1) for block in blocks
    ]
    return torch.cat([combine_tensors(part, p) for part in parts])


def _block_norms(rows: Tensor, p: float) -> Tensor:
    """The norms of the rows of a matrix of about ``_PIECE`` elements, whatever the number of threads."""
    whole = rows.shape[1] - rows.shape[1] % _ROW
    pieces = (rows[:, :whole].reshape(len(rows), -1, _ROW), rows[:, None, whole:])
    return combine_tensors(torch.cat([_matrix_norms(n, p) for n in pieces if n.numel()], dim=1), p)


def _host_norm(tensors: Sequence[Tensor], p: float) -> float:
    parts: list[float] = []
    of_rows: list[Tensor] = []
    for piece in _host_pieces(tensors, p):
        if _is_narrow(piece, p):
            of_rows += _narrow_norms(piece, p)
        else:
            parts.append(_piece_norm(piece, p))
    if of_rows:
        joined = of_rows[0] if len(of_rows) == 1 else torch.cat(of_rows)
        parts += [float(vector_norm(some, p)) for some in _split(joined, _SERIAL)]
    return combine(parts, p)


def _host_pieces(tensors: Sequence[Tensor], p: float) -> Iterator[Tensor]:
    """The elements of tensors in one-dimensional pieces of at most ``_LONG_PIECE``, small tensors joined."""
    small: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        for values in (tensor,) if tensor.layout is torch.strided else stored(tensor, p):
            size = values.numel()
            if size > _SMALL:
                yield from _pieces(values, _LONG_PIECE if _is_narrow(values, p) else _PIECE)
            elif size:
                small.setdefault(values.dtype, []).append(values)
    for group in small.values():
        yield from _joined(group)


def _device_norm(tensor: Tensor, p: float) -> Tensor:
    parts = []
    for values in stored(tensor, p):
        if values.numel():
            whole = values.dtype in _NARROW or recorded()
            pieces = (values.reshape(1, -1),) if whole else (n.view(1, -1) for n in _pieces(values))
            parts += [_matrix_norms(piece, p) for piece in pieces]
    return combine_tensors(torch.cat(parts), p)


def _piece_norm(piece: Tensor, p: float) -> float:
    """The norm of a one-dimensional tensor of at most ``_PIECE`` elements."""
    return combine(torch.cat([_matrix_norms(rows, p) for rows in _rows(piece, _ROW)]).tolist(), p)


def _rows(piece: Tensor, length: int) -> list[Tensor]:
    """A one-dimensional tensor as a matrix of rows of some length, and one of a single row with the rest."""
    whole = len(piece) - len(piece) % length
    return [part for part in (piece[:whole].view(-1, length), piece[whole:].view(1, -1)) if part.numel()]


def _is_narrow(tensor: Tensor, p: float) -> bool:
    """Whether no power leaves the range of float64: of the orders 1 and 2, and shorter real numbers."""
    return p in (1, 2) and tensor.dtype in _NARROW_REAL


def _narrow_norms(piece: Tensor, p: float) -> list[Tensor]:
    """Float64 norms of the parts of a narrow piece."""
    if len(piece) <= _SMALL:
        return [vector_norm(piece, p, dim=0, keepdim=True, dtype=torch.float64)]
    verified = _verified_float32_norms(piece, p) if len(piece) >= _LARGE else None
    if verified is not None:
        return verified
    return [
        vector_norm(rows, p, dim=1, dtype=torch.float64)
        for part in _split(piece, _PIECE)
        for rows in _rows(part, _ROW)
    ]


def _verified_float32_norms(piece: Tensor, p: float) -> list[Tensor] | None:
    """The norms of two parts of a piece at the speed of float32, or None where they are not accurate.

    Rows of 128 are summed in float32 and joined in float64.  On most gradients the rows' rounding errors
    cancel out (to some 1e-9); where they do not, as for constant ones, every 67th row, done again in float64,
    shows it: 67 is in step with no usual width of a matrix.
    """
    rows, *rest = _rows(piece, 128)
    of_rows = vector_norm(rows, p, dim=1, dtype=torch.float32).double()
    of_whole = vector_norm(of_rows, p)
    sampled, exact, whole = torch.stack(
        [
            vector_norm(of_rows[::67], p),
            vector_norm(vector_norm(rows[::67], p, dim=1, dtype=torch.float64), p),
            of_whole,
        ]
    ).tolist()
    # Far from both ends of the float32 range, where squares overflow or lose their digits.
    in_range = 1e-15 * len(of_rows) < whole < 1e15
    # Next to nothing in the rows looked at says nothing about the others.
    telling = exact**p > whole**p / 256
    if not (in_range and telling and abs(sampled - exact) <= 2e-8 * exact):
        return None
    return [of_whole.view(1), *(vector_norm(part, p, dim=1, dtype=torch.float64) for part in rest)]


def _matrix_norms(rows: Tensor, p: float) -> Tensor:
    """The norms along the last axis in the widest dtype, without overflow or underflow on the way."""
    narrow, wide = rows.dtype in _NARROW, _wide(rows)
    if not narrow:
        rows = rows.to(wide)  # as vector_norm does not read float8
    if rows.is_complex() and p != 2:
        # Of a single complex number vector_norm looks at the real part only, for order 0.
        rows = rows.to(wide).abs()
        wide = rows.dtype
    plain: Tensor = vector_norm(rows, p, dim=-1, dtype=wide)
    if p in (0, math.inf, -math.inf) or (p in (1, 2) and narrow and wide in _DOUBLE):
        return plain
    # The powers are in range if those of the results are.
    regular = (plain > 0) & (abs(p) * plain.log().abs() < 600)
    if on_host([rows]) and bool(regular.all()):
        return plain
    magnitudes = rows.to(wide).abs()
    leading = magnitudes.amax(dim=-1) if p > 0 else magnitudes.amin(dim=-1)
    usable = (leading > 0) & leading.isfinite()
    divisor = torch.where(usable, leading, 1.0)
    scaled: Tensor = vector_norm(magnitudes / divisor.unsqueeze(-1), p, dim=-1) * divisor
    return torch.where(usable, scaled, leading)


_NARROW_REAL = frozenset({torch.float32, torch.float16, torch.bfloat16})
_NARROW = _NARROW_REAL | {torch.complex64, torch.complex32}
_DOUBLE = frozenset({torch.float64, torch.complex128})


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype to accumulate in: the widest that the device has."""
    wide = norm_dtype(tensor.device)
    if not tensor.is_complex():
        return wide
    return torch.complex64 if wide is torch.float32 else torch.complex128


# How tensors lie in memory


def stored(tensor: Tensor, p: float) -> Iterator[Tensor]:
    """The strided tensors whose elements are the tensor's; for a sparse one, those that it stores."""
    if tensor.layout == torch.strided:
        yield tensor
        return
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
    if tensor.layout == torch._mkldnn:  # type: ignore[attr-defined]
        yield tensor.to_dense()
        return
    values = tensor.values()
    yield values
    if p < 0 and values.numel() < tensor.numel():
        yield values.new_zeros(1)


def _pieces(tensor: Tensor, length: int = _PIECE) -> Iterator[Tensor]:
    """The elements of a strided tensor in pieces of at most ``length``, copied only if they are scattered."""
    flat = _flat(tensor)
    if flat is not None:
        yield from _split(flat, length)
    elif tensor.numel() <= _PIECE:
        yield tensor.reshape(-1)
    else:
        longest = max(range(tensor.dim()), key=lambda d: tensor.shape[d])
        for half in tensor.chunk(2, dim=longest):
            yield from _pieces(half)


def _split(vector: Tensor, length: int) -> Sequence[Tensor]:
    return (vector,) if len(vector) <= length else torch.split(vector, length)


def fills_its_memory(tensor: Tensor) -> bool:
    """Whether a strided tensor has no gaps between its elements, in whatever order its axes lie."""
    return _flat(tensor) is not None


def _flat(tensor: Tensor) -> Tensor | None:
    """A one-dimensional view of a tensor that fills its memory in any order of its axes, else None."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    strides = tensor.stride()
    by_stride = sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))
    ordered = tensor.permute(by_stride)
    return ordered.view(-1) if ordered.is_contiguous() else None


def _joined(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Small tensors of one dtype, copied beside each other into pieces of at most ``_PIECE`` elements."""
    group: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if size + tensor.numel() > _PIECE:
            yield _beside(group)
            group, size = [], 0
        group.append(tensor)
        size += tensor.numel()
    yield _beside(group)


def _beside(tensors: Sequence[Tensor]) -> Tensor:
    # Autocast meddles with all that concatenates: it refuses float16 where it is about bfloat16.
    with torch._C._DisableAutocast():
        return _flatten(tensors)


# Changes in place


def scale_(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply every tensor in place; each product is formed in at least float32, then rounded."""
    if isinstance(factor, float) and 0 < factor < _FLOAT32_TINY:
        # Too small for float32; a power of two, which rounds nothing, takes it part of the way.
        scale_(tensors, _STEP)
        scale_(tensors, factor / _STEP)
        return
    with torch.no_grad():
        together, alone = _parted(tensors)
        for tensor in alone:
            _scale_alone(tensor, factor)
        for (dtype, device), group in together.items():
            if dtype in (torch.float32, torch.float64):
                # Of a number torch would make a tensor again for each of the group.
                torch._foreach_mul_(group, _as_tensor(factor, dtype, device))
                continue
            # Multiplied together, they would round the factor to their own low precision, by up to 0.4 %.
            for tensor in group:
                if isinstance(factor, float):
                    tensor.mul_(factor)
                else:
                    tensor.copy_(tensor.float() * factor.to(device, torch.float32))


def _as_tensor(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.scalar_tensor(value, dtype=dtype, device=device)


def _parted(
    tensors: Sequence[Tensor],
) -> tuple[dict[tuple[torch.dtype, torch.device], list[Tensor]], list[Tensor]]:
    """The tensors that can be changed together, as real numbers, by dtype and device; and the others."""
    together: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    alone = []
    recording = recorded()
    for tensor in tensors:
        is_complex = tensor.is_complex()
        # A tensor may stand for its memory's negative or, while recording, for its conjugate.
        lazy = is_complex if recording else tensor.is_neg()
        if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or lazy:
            alone.append(tensor)
            continue
        real = torch.view_as_real(_without_conj(tensor)) if is_complex else tensor
        key = (real.dtype, real.device)
        if key in together:
            together[key].append(real)
        else:
            together[key] = [real]
    return together, alone


_PLAIN = (Tensor, torch.nn.Parameter)
_FLOAT32_TINY, _STEP = torch.finfo(torch.float32).tiny, 2.0**-64


def scale_rows_(tensor: Tensor, factors: Tensor) -> None:
    """Multiply each slice along the first axis in place by its own float64 factor."""
    real = torch.view_as_real(_without_conj(tensor)) if tensor.is_complex() else tensor
    too_small = (factors > 0) & (factors < _FLOAT32_TINY)
    if on_host([factors]) and bool(too_small.any()):
        steps = torch.where(too_small, _STEP, 1.0)
        scale_rows_(tensor, steps)
        scale_rows_(tensor, factors / steps)
        return
    factors = factors.to(torch.promote_types(real.dtype, torch.float32)).view(-1, *[1] * (real.dim() - 1))
    if factors.dtype == real.dtype:
        real.mul_(factors)
        return
    # Torch would widen the whole tensor at once.
    rows = max(1, _PIECE * len(real) // max(1, real.numel()))
    for part, of_part in zip(torch.split(real, rows), torch.split(factors, rows), strict=True):
        part.mul_(of_part)


def _scale_alone(tensor: Tensor, factor: float | Tensor) -> None:
    if tensor.layout in SPARSE:
        scale_([own_values(tensor)], factor)
        torch.autograd.graph.increment_version(tensor)
    else:
        tensor.mul_(factor)


def clamp_(tensors: Sequence[Tensor], limit: float) -> None:
    """Limit every element in place to ``[-limit, limit]``; NaN stays NaN."""
    together, alone = _parted(tensors)
    with torch.no_grad():
        for (dtype, _), group in together.items():
            small = [tensor for tensor in group if tensor.numel() <= _SMALL]
            if small:
                torch._foreach_clamp_max_(small, _within(dtype, limit))
                torch._foreach_clamp_min_(small, -_within(dtype, limit))
            if len(small) < len(group):
                alone += [tensor for tensor in group if tensor.numel() > _SMALL]
    _change_elements_(alone, lambda v: v.clamp_(-_within(v.dtype, limit), _within(v.dtype, limit)))


def _within(dtype: torch.dtype, limit: float) -> float:
    # Torch refuses a limit beyond the dtype's range, which limits nothing.
    return limit if limit <= torch.finfo(dtype).max else math.inf


def zero_nonfinite_(tensors: Sequence[Tensor]) -> None:
    """Put 0 in the place of every element that is infinite or NaN."""
    _change_elements_(tensors, lambda values: values.masked_fill_(~values.isfinite(), 0))


def _change_elements_(tensors: Sequence[Tensor], change_: Callable[[Tensor], Tensor]) -> None:
    with torch.no_grad():
        for tensor in tensors:
            if tensor.layout not in SPARSE:
                change_(tensor)
                continue
            if tensor.layout == torch.sparse_coo and not tensor.is_coalesced():
                # Entries for the same place add up to the element that is meant.
                tensor.copy_(tensor.coalesce())
            change_(own_values(tensor))
            torch.autograd.graph.increment_version(tensor)


SPARSE = frozenset({torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})


def own_values(tensor: Tensor) -> Tensor:
    """The values that a sparse tensor stores, not a copy of them."""
    # Of values() not detached no view can be made, as complex ones need.
    return tensor._values() if tensor.layout == torch.sparse_coo else tensor.values().detach()


def _without_conj(tensor: Tensor) -> Tensor:
    """The same memory without the lazy conjugation, which scaling by a real number does not see."""
    return tensor.conj() if tensor.is_conj() else tensor
