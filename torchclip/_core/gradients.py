"""The tensors of one call, and the two primitives over them: norms, and changes in place.

Every clipping rule works on a batch: the CPU kernel's part of it and the rest, which goes through torch
operations, are joined here and nowhere else.
"""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torchclip import kernel
from torchclip._core import arguments, distributed, eager
from torchclip._core.combine import ABSENT, combine, join, stacked
from torchclip.kernel import AnyBatch

__all__ = [
    "Gradients",
    "clamp_",
    "norm",
    "norms",
    "of_parameters",
    "of_tensors",
    "refuse_unwritable",
    "scale_",
    "scale_each_",
    "warn_if_used_up",
    "zero_nonfinite_",
]

_WRITABLE = frozenset(
    {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    | {torch.complex32, torch.complex64, torch.complex128}
)
_KERNEL_ORDERS = frozenset({1.0, 2.0, math.inf})
_CPU = torch.device("cpu")


Gradients: TypeAlias = "AnyBatch | Sharded"
"""The tensors of one call."""


def of_parameters(parameters: Tensor | Iterable[Tensor], group: Any = None) -> Gradients:
    """The distinct gradients of the parameters that have one, in order, to be changed in place.

    As a batch or as ``Sharded``; gradients that cannot be changed are refused.
    """
    items = arguments.tensor_list("parameters", parameters)
    local = kernel.Batch(items, "parameters", True) if eager.recorded() else kernel.gradients(items)
    batch: Gradients = local
    if local.subclassed or group is not None:
        batch = _sharded(local, items, True, group)
    elif not items:
        warn_if_used_up(parameters)
    if batch.rest:
        refuse_unwritable(batch.rest, items)
    return batch


def warn_if_used_up(parameters: Tensor | Iterable[Tensor]) -> None:
    """Torch's warning for a generator that gave no items: most often it was used up before."""
    if isinstance(parameters, types.GeneratorType):
        # The line to show is three calls up, where a clipping function was called.
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=4)


def of_tensors(tensors: Tensor | Iterable[Tensor], group: Any = None) -> Gradients:
    """The distinct tensors of an argument named ``tensors``, to be measured, likewise."""
    items = arguments.tensor_list("tensors", tensors)
    batch = _local(items)
    return _sharded(batch, items, False, group) if batch.subclassed or group is not None else batch


def _local(tensors: Sequence[Tensor]) -> AnyBatch:
    return kernel.Batch(tensors, "tensors", False) if eager.recorded() else kernel.tensors(tensors)


def _sharded(batch: AnyBatch, items: Sequence[Tensor], take_grad: bool, group: Any) -> Gradients:
    # A parameter without a gradient here may have one on another rank, which waits for this one.
    if group is not None or any(map(distributed.is_dtensor, items)):
        return Sharded(items, take_grad, distributed.as_groups(group))
    return batch


class Sharded:
    """Tensors of which this rank may hold only parts: as a batch, with norms that all ranks agree on.

    Args:
        items: parameters or tensors.
        take_grad: whether the gradients of the items are meant.
        groups: process groups whose ranks hold further gradients.

    Attributes:
        all: the distinct tensors, in order, as the user sees them.
        local: the batch of what this rank holds of them, in their own memory.
    """

    def __init__(self, items: Sequence[Tensor], take_grad: bool, groups: Sequence[Any]) -> None:
        self._groups = groups
        self.all: list[Tensor] = []
        # How tensors lie, in the order of the items on every rank, and which of `all` do: None stands for one
        # that is not here, but may be on other ranks.
        self._places: dict[distributed.Layout | None, list[int | None]] = {}
        self._partial = False
        self._sharded: list[Tensor] = []
        found: dict[int, int] = {}
        places_like: dict[Any, list[int | None]] = {}
        dtensor = distributed.dtensor_types()
        for item in dict.fromkeys(items):
            grad = item.grad if take_grad else item
            tensor = item if grad is None else grad
            sharded = isinstance(tensor, dtensor)
            like = (id(tensor.device_mesh), tensor.placements) if sharded else None  # type: ignore[attr-defined]
            places = places_like.get(like)
            if places is None:
                layout = distributed.layout_of(tensor)
                places = places_like[like] = self._places.setdefault(layout, [])
                self._partial |= distributed.is_partial(tensor)
            if grad is None:
                places.append(None)
                continue
            places.append(found.setdefault(id(grad), len(self.all)))
            if len(found) > len(self.all):
                self.all.append(grad)
                if sharded:
                    self._sharded.append(grad)
        self._locals = distributed.locals_of(self.all)
        self.local = _local(self._locals)
        self.count, self.facts = len(items), self.local.facts

    @property
    def rest(self) -> Sequence[Tensor]:
        """The local parts that the kernel does not take."""
        return self.local.rest

    def written(self) -> AnyBatch:
        """The local batch, for a change in place that the tensors it belongs to shall know of."""
        torch.autograd.graph.increment_version(self._sharded)
        return self.local

    def refuse_partial(self, what: str) -> None:
        """Raise an error for tensors pending a reduction, whose elements are not known before it."""
        for i, tensor in enumerate(self.all if self._partial else []):
            if distributed.is_dtensor(tensor) and distributed.is_partial(tensor):
                raise TypeError(
                    f"{what} needs the elements of gradient {i} of shape {tuple(tensor.shape)}, but it is "
                    f"pending a reduction over ranks ({tensor.placements}); reduce it first "
                    "(`p.grad = p.grad.redistribute(placements=p.placements)`)"
                )

    def norm(self, p: float, finite: bool) -> float | Tensor:
        """The norm of all the tensors on all ranks."""
        held = self._held(finite)
        norms = {
            layout: self._norm_of([held[i] for i in dict.fromkeys(places) if i is not None], p, finite)
            for layout, places in self._places.items()
        }
        return distributed.total(norms, self._groups, p)

    def norms(self, p: float, finite: bool) -> list[float | Tensor]:
        """The norm of each tensor, with the parts of it that other ranks hold."""
        held = self._held(finite)
        of_held = [self._norm_of([tensor], p, finite) for tensor in held]
        mesh = next((layout.mesh for layout in self._places if layout is not None), None)
        device = mesh.device_type if mesh else next((t.device for t in self._locals), _CPU)
        vectors = {
            layout: stacked([ABSENT if i is None else of_held[i] for i in places], device)
            for layout, places in self._places.items()
        }
        of_all: list[Any] = [None] * len(self.all)
        for layout, joint in distributed.across_meshes(vectors, p).items():
            for i, value in zip(self._places[layout], self._numbers(joint.clamp(min=0.0)), strict=True):
                if i is not None:
                    of_all[i] = value
        return of_all

    def _held(self, finite: bool) -> Sequence[Tensor]:
        """What this rank holds of each tensor, to be measured: reduced if that is pending."""
        if finite:
            self.refuse_partial("zeroing non-finite elements")
        if not self._partial:
            return self._locals
        return distributed.locals_of(distributed.without_partial(self.all))

    def _norm_of(self, tensors: Sequence[Tensor], p: float, finite: bool) -> float | Tensor:
        """The norm of some of what this rank holds."""
        if not any(tensor.numel() for tensor in tensors):
            return ABSENT
        whole = not self._partial and len(tensors) == len(self.local.all)
        return norm(self.local if whole else _local(tensors), p, finite)

    def _numbers(self, vector: Tensor) -> list[float | Tensor]:
        """The elements of a vector: floats, if nobody has to wait for the tensors' device."""
        return vector.tolist() if eager.on_host(self._locals) else list(vector)


def refuse_unwritable(tensors: Iterable[Tensor], parameters: Sequence[Tensor]) -> None:
    """Raise an error for gradients that cannot be changed in place, before any is.

    Torch's own where elements share memory, so that one would be changed several times.

    Args:
        tensors: what this rank holds of some of the parameters' gradients.
        parameters: the items of the argument, to say which of them it is.
    """
    for tensor in tensors:
        if tensor.dtype not in _WRITABLE:
            raise TypeError(
                f"{_whose(tensor, parameters)} and dtype {tensor.dtype}, which cannot be scaled; "
                "convert it first (`p.grad = p.grad.float()`)"
            )
        if tensor.layout is torch.strided and tensor.is_contiguous():
            continue  # as most are, and sooner seen than that no stride is 0
        values = eager.own_values(tensor) if tensor.layout in eager.SPARSE else tensor
        if values.layout is not torch.strided or 0 not in values.stride() or values.numel() == 0:
            continue
        if any(stride == 0 and size > 1 for stride, size in zip(values.stride(), values.shape, strict=True)):
            raise RuntimeError(
                "unsupported operation: more than one element of the written-to tensor refers to a single "
                f"memory location ({_whose(tensor, parameters)}, which is expanded). Please clone() the "
                "tensor before performing the operation."
            )


def _whose(gradient: Tensor, parameters: Sequence[Tensor]) -> str:
    held = distributed.locals_of([p if p.grad is None else p.grad for p in parameters])
    item = next((f"item {i}" for i, each in enumerate(held) if each is gradient), "an item")
    return f"{item} of `parameters` has a gradient of shape {tuple(gradient.shape)}"


def norm(batch: Gradients, p: float, finite: bool = False) -> float | Tensor:
    """The norm of the whole batch: a float, or a float64 tensor where a device must not be waited for.

    With ``finite``, for an order above 0, as if its elements that are infinite or NaN were 0.
    """
    if isinstance(batch, Sharded):
        return batch.norm(p, finite)
    if finite:
        return join(norms(batch, p, finite), p) if batch.all else 0.0
    if p not in _KERNEL_ORDERS:
        return eager.norm(batch.all, p) if batch.all else 0.0
    rest = batch.rest
    if len(rest) == len(batch.all):
        return eager.norm(rest, p) if rest else 0.0
    of_kernel = max(batch.norm(p), 0.0)
    if not rest:
        return of_kernel
    of_rest = eager.norm(rest, p)
    if isinstance(of_rest, Tensor):
        return eager.norm([of_rest, of_rest.new_tensor(of_kernel)], p)
    return combine([of_kernel, of_rest], p)


def norms(batch: Gradients, p: float, finite: bool = False) -> list[float | Tensor]:
    """The norm of each tensor of the batch, in order: floats, or float64 tensors as in ``norm``."""
    if isinstance(batch, Sharded):
        return batch.norms(p, finite)
    if finite:
        of_copies = []
        for tensor in batch.all:
            copy = tensor.detach().clone()  # of one at a time, so that there is never a second set of them
            eager.zero_nonfinite_([copy])
            of_copies.append(norm(_local([copy]), p))
        return of_copies
    if p not in _KERNEL_ORDERS or len(batch.rest) == len(batch.all):
        return eager.norms(batch.all, p)
    of_rest = dict(zip(map(id, batch.rest), eager.norms(batch.rest, p), strict=True))
    of_kernel = zip(batch.all, batch.norms(p), strict=True)
    return [of_rest.get(id(tensor), max(norm, 0.0)) for tensor, norm in of_kernel]


def scale_(batch: Gradients, factor: float | Tensor) -> None:
    """Multiply every tensor of the batch in place; by 1.0, which would change nothing, not at all."""
    if isinstance(factor, float) and factor == 1.0:
        return
    if isinstance(batch, Sharded):
        batch = batch.written()
    rest = batch.rest
    if not rest or len(rest) < len(batch.all):
        batch.scale_(float(factor))
    if rest:
        eager.scale_(rest, factor)


def scale_each_(batch: Gradients, factors: Sequence[float | Tensor]) -> None:
    """Multiply each tensor of the batch in place by its own factor; by 1.0 not at all."""
    if isinstance(batch, Sharded):
        batch = batch.written()
    if len(batch.rest) < len(batch.all):
        batch.scale_each_(list(map(float, factors)))
    if batch.rest:
        of_tensor = {id(t): f for t, f in zip(batch.all, factors, strict=True)}
        for tensor in batch.rest:
            factor = of_tensor[id(tensor)]
            if not (isinstance(factor, float) and factor == 1.0):
                eager.scale_([tensor], factor)


def clamp_(batch: Gradients, limit: float) -> None:
    """Limit every element of the batch in place to ``[-limit, limit]``."""
    if isinstance(batch, Sharded):
        batch.refuse_partial("clipping by value")
        batch = batch.written()
    rest = batch.rest
    if not rest or len(rest) < len(batch.all):
        batch.clamp_(limit)
    if rest:
        eager.clamp_(rest, limit)


def zero_nonfinite_(batch: Gradients) -> None:
    """Put 0 in the place of every infinite or NaN element of the batch."""
    if isinstance(batch, Sharded):
        batch = batch.written()
    eager.zero_nonfinite_(batch.all)
