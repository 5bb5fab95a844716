"""How tensors lie in memory, and whether their values can be read."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN = (Tensor, torch.nn.Parameter)  # not a set, which torch.compile of torch 2.6 does not know
SPARSE = frozenset({torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})
DOUBLE = frozenset({torch.float64, torch.complex128})
# The number of elements processed at a time, so that temporary memory does not grow with the gradients.
PIECE = 1 << 20

_WRITABLE = frozenset(
    {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    | {torch.complex32, torch.complex64, torch.complex128}
)
_REAL = frozenset(dtype for dtype in _WRITABLE if not dtype.is_complex)
_LOW = 1 << 40
"""A tensor without memory has its storage offset as its address, which is below this."""
_flatten: Callable[[Sequence[Tensor]], Tensor] = torch._utils._flatten_dense_tensors

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Whether operations are recorded or transformed, so that they must be torch's

_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.maybe_current_level

_forward_level: Callable[[str], int] = vars(forward_ad).__getitem__


def _sees_operations() -> bool:
    """Whether any function mode does more than choose a device for new tensors."""
    modes = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(type(mode) is not torch.utils._device.DeviceContext for mode in modes)


class Check(NamedTuple):
    """A check of whether operations are recorded or transformed; the kernel makes it in each call.

    Attributes:
        function: a function in C; in a training step one frame in Python would take longer than all checks.
        argument: its argument; None if it takes none.
        idle: its answer while nobody sees operations.
        otherwise: called after another answer: whether somebody really sees them; None if that is certain.
    """

    function: Callable[..., object]
    argument: object
    idle: object
    otherwise: Callable[[], bool] | None = None


CHECKS = (
    Check(_dispatch_modes, None, 0),
    Check(torch.overrides.has_torch_function_unary, 0, False, _sees_operations),  # 0: only for function modes
    Check(_transform, None, None),
    Check(torch._C._is_tracing, None, False),
    Check(_forward_level, "_current_level", -1),
)
"""All who can see operations apart from ``torch.compile``, whose traces do not reach the kernel."""


def intercepted() -> bool:
    """Whether operations are recorded or transformed, so that all of them must be torch's.

    ``torch.compile``, dispatch and function modes, ``torch.func``, ``torch.jit.trace`` and forward-mode
    differentiation do so.  No value may be read then.  The kernel asks ``CHECKS`` itself.
    """
    return _is_compiling() or any(_fails(check) for check in CHECKS)


def _fails(check: Check) -> bool:
    function, argument, idle, otherwise = check
    if (function() if argument is None else function(argument)) == idle:
        return False
    return otherwise is None or otherwise()


def not_compiled(function: _Function) -> _Function:
    """``torch.compiler.disable``, but the compiler is imported in the first call only."""
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return cast("_Function", call)


def values_hidden() -> bool:
    """Whether a tensor may be lazily conjugated or negated without showing it, as in a mode."""
    return _is_compiling() or _dispatch_modes() > 0


def transformed() -> bool:
    """Whether operations are differentiated or vectorized, where those on lists of tensors do not work."""
    return not values_hidden() and (_transform() is not None or _forward_level("_current_level") >= 0)


def on_host(tensors: Iterable[Tensor]) -> bool:
    """Whether the values of all tensors can be read without waiting for a device; fake tensors have none."""
    if intercepted():
        return False
    for tensor in tensors:  # all() takes three times as long
        if not tensor.is_cpu or (type(tensor) not in PLAIN and hasattr(tensor, "fake_mode")):
            return False
    return True


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype of tensors that are all plain, real, of the same dtype, and contiguous in host memory; else
    None.

    Most calls have such tensors.  They need no more checks: all of them can be written to.
    """
    dtype = tensors[0].dtype if tensors else None
    if dtype not in _REAL:
        return None
    for tensor in tensors:  # one expression, because calls with many small tensors spend their time here
        if (
            tensor.dtype is not dtype
            or type(tensor) not in PLAIN
            or tensor.layout is not torch.strided
            or not tensor.is_contiguous()
            or not tensor.is_cpu
            or tensor.is_neg()
            or (tensor.data_ptr() < _LOW and (_is_zero_tensor(tensor) or without_memory(tensor)))
        ):
            return None
    return dtype


def concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """The elements of strided tensors of one dtype, copied into one vector."""
    if not torch.is_autocast_enabled("cpu"):
        return _flatten(tensors)
    # Autocast changes every concatenation: in bfloat16 it refuses float16.
    with torch.autocast("cpu", enabled=False):
        return _flatten(tensors)


def stored(tensor: Tensor, p: float) -> Iterator[Tensor]:
    """The strided tensors with a tensor's elements; for a sparse one, the elements that it stores."""
    if tensor.layout == torch.strided:
        yield tensor
        return
    if is_uncoalesced(tensor):
        with torch.inference_mode(tensor.is_inference()):  # torch adds entries only in the tensor's own mode
            tensor = tensor.coalesce()
    if tensor.is_mkldnn:
        yield tensor.to_dense()
        return
    values = tensor.values()
    yield values
    if p < 0 and values.numel() < tensor.numel():
        yield values.new_zeros(1)


def own_values(tensor: Tensor) -> Tensor:
    """The tensor; of a sparse one, the values that it stores, not a copy: a COO tensor must be coalesced."""
    # They must be detached to be viewed as real numbers.
    return tensor.values().detach() if tensor.layout in SPARSE else tensor


def is_uncoalesced(tensor: Tensor) -> bool:
    """Whether a sparse tensor may store several entries for one place."""
    return tensor.layout is torch.sparse_coo and not tensor.is_coalesced()


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The elements of a strided tensor in pieces of at most ``PIECE``, copied only if there are gaps."""
    whole = flat(tensor)
    if whole is not None:
        yield from torch.split(whole, PIECE)
    elif tensor.numel() <= PIECE:
        yield tensor.reshape(-1)
    else:
        longest = max(range(tensor.dim()), key=lambda d: tensor.shape[d])
        for half in tensor.chunk(2, dim=longest):
            yield from pieces(half)


def by_rows(tensor: Tensor) -> Sequence[Tensor]:
    """A tensor in parts along its first axis, of about ``PIECE`` elements."""
    if tensor.numel() <= PIECE:
        return (tensor,)
    return torch.split(tensor, max(1, PIECE * len(tensor) // tensor.numel()))


def flat(tensor: Tensor) -> Tensor | None:
    """A one-dimensional view of a tensor without gaps, in any order of its axes; else None."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    strides = tensor.stride()
    by_stride = sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))
    ordered = tensor.permute(by_stride)
    return ordered.view(-1) if ordered.is_contiguous() else None


def as_real(tensor: Tensor) -> Tensor:
    """A tensor's own memory as real numbers, to be multiplied by a real one, for which a lazy conjugation
    does not matter.

    Where operations are intercepted a complex tensor stays as it is, as a conjugation may not show.
    """
    if not tensor.is_complex() or values_hidden():
        return tensor
    return torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is plain strided memory, as operations on lists need it."""
    if type(tensor) not in PLAIN or tensor.layout is not torch.strided:
        return False
    # It may be lazily negated, which does not show where operations are intercepted.
    return values_hidden() or not tensor.is_neg()


def check_writable(tensors: Iterable[Tensor], described: Callable[[Tensor], str]) -> None:
    """Raise an error for gradients that cannot be changed in place, before any is.

    The error is torch's own if elements share memory, so that one would be changed several times.  The memory
    of traced tensors is not known.

    Args:
        tensors: the gradients, or this rank's parts of them.
        described: says whose gradient a tensor is.
    """
    hidden = intercepted()
    for tensor in tensors:
        if not hidden and without_memory(tensor):
            raise RuntimeError(
                f"{described(tensor)} that has no memory, as its storage was resized to 0 bytes; resize it "
                "back, or set the gradient to None (`p.grad = None`)"
            )
        if not hidden and _is_zero_tensor(tensor):
            raise RuntimeError(
                f"{described(tensor)} that represents zeros and has no memory to change; "
                "clone it first (`p.grad = p.grad.clone()`)"
            )
        if tensor.layout is torch.strided and tensor.is_contiguous() and tensor.dtype in _WRITABLE:
            continue  # the usual case
        if tensor.dtype not in _WRITABLE:
            raise TypeError(
                f"{described(tensor)} and dtype {tensor.dtype}, which cannot be scaled; "
                "convert it first (`p.grad = p.grad.float()`)"
            )
        if is_uncoalesced(tensor):
            continue  # a copy is changed, in which the entries for one place were added
        values = own_values(tensor)
        if values.layout is torch.strided and not values.is_contiguous() and _overlaps_itself(values):
            raise RuntimeError(
                "unsupported operation: more than one element of the written-to tensor refers to a single "
                f"memory location ({described(tensor)}, which is expanded or overlaps itself). Please "
                "clone() the tensor before performing the operation."
            )


def check_has_memory(tensors: Iterable[Tensor], name: str) -> None:
    """Raise an error for items of an argument whose storage was resized to nothing, which have no values."""
    if intercepted():
        return
    for i, tensor in enumerate(tensors):
        if without_memory(tensor):
            raise RuntimeError(
                f"item {i} of `{name}`, of shape {tuple(tensor.shape)}, has no memory, as its storage was "
                "resized to 0 bytes; resize it back first"
            )


def without_memory(tensor: Tensor) -> bool:
    """Whether the storage of a tensor with elements was resized to nothing."""
    if type(tensor) not in PLAIN or tensor.is_meta or is_uncoalesced(tensor):
        return False
    values = own_values(tensor)
    if values.layout is not torch.strided or values.numel() == 0:
        return False
    return values.untyped_storage().nbytes() == 0


def _is_zero_tensor(tensor: Tensor) -> bool:
    """Whether a tensor with elements represents zeros without memory, as autograd may make it."""
    if type(tensor) not in PLAIN or tensor.is_meta or tensor.layout is not torch.strided:
        return False
    return tensor.numel() > 0 and tensor.data_ptr() == 0


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a strided tensor share a place in memory."""
    if tensor.numel() == 0:
        return False
    axes = sorted(
        (stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    )
    reach = 0  # the offset of the last element along the axes so far
    for stride, size in axes:
        if stride == 0:
            return True
        if stride <= reach:
            return _has_equal_offsets(axes, tensor.numel())
        reach += (size - 1) * stride
    return False


def _has_equal_offsets(axes: Sequence[tuple[int, int]], count: int) -> bool:
    # Axes may interleave without overlapping; only the offsets themselves show it.
    offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in axes:
        steps = torch.arange(0, size * stride, stride, device="cpu")
        offsets = (offsets.view(-1, 1) + steps).view(-1)
    return len(set(offsets.tolist())) < count


def signs_of_change(tensor: Tensor) -> tuple[object, ...]:
    """What shows, beside its version, whether a tensor is still the same; does not wait for a device."""
    values = tensor._values() if tensor.layout is torch.sparse_coo else tensor
    if values.layout is not torch.strided or values.is_meta:
        return ()
    if not on_host([values]) or not values.numel():
        return (values.data_ptr(),)
    return values.data_ptr(), repr(_telling_element(values))


def _telling_element(values: Tensor) -> complex:
    """The first element that is neither 0 nor infinite nor NaN; if there is none, the first of all."""
    flat = values.detach().reshape(-1)[:PIECE] if values.is_contiguous() else values.detach().flatten()
    first: complex = flat[0].item()
    if first != 0 and abs(first) < math.inf:
        return first
    telling = ((flat != 0) & flat.isfinite()).nonzero()
    return first if not len(telling) else flat[telling[0, 0]].item()
