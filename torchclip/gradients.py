"""The tensors of one call, and the two primitives over them: norms, and changes in place.

Every clipping rule works on a batch: the CPU kernel's part of it and the rest, which goes through torch
operations, are joined here and nowhere else.
"""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchclip import arguments, distributed, eager, kernel
from torchclip.combine import combine, combine_tensors

__all__ = [
    "clamp_",
    "norm",
    "norms",
    "of_parameters",
    "of_tensors",
    "refuse_expanded",
    "scale_",
    "scale_each_",
]

_KERNEL_ORDERS = frozenset({1.0, 2.0, math.inf})
_threads = torch.get_num_threads


def of_parameters(parameters: Tensor | Iterable[Tensor], group: Any = None) -> Any:
    """The distinct gradients of the parameters that have one, in order, as a batch or as :class:`Sharded`."""
    items = arguments.tensor_iterable("parameters", parameters)
    batch = _gathered(items, "parameters", group)
    if batch.count == 0 and isinstance(parameters, types.GeneratorType):
        # Users know the warning from torch: most often the generator was used up before.
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    return batch


def of_tensors(tensors: Tensor | Iterable[Tensor], group: Any = None) -> Any:
    """The distinct tensors of an argument named ``tensors``, likewise."""
    return _gathered(arguments.tensor_iterable("tensors", tensors), "tensors", group)


def _gathered(items: Iterable[Tensor], name: str, group: Any) -> Any:
    groups = distributed.as_groups(group)
    if not isinstance(items, (list, tuple)):
        items = list(items)
    take_grad = name == "parameters"
    batch = _local(items, name, take_grad)
    # A parameter without a gradient here may have one on another rank, which waits for this one.
    if groups or (batch.subclassed and any(map(distributed.is_sharded, items))):
        return Sharded(items, take_grad, groups)
    return batch


def _local(items: Sequence[Tensor], name: str, take_grad: bool) -> Any:
    if eager.traced():
        return kernel.Batch(items, name, take_grad)
    return kernel.gradients(items) if take_grad else kernel.tensors(items)


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
        found: dict[int, Tensor] = {}
        # In the order of the items, on every rank: how each is split, and which of `all` it is, if here.
        self._places: list[tuple[distributed.Layout | None, int | None]] = []
        for item in dict.fromkeys(items):
            tensor = item.grad if take_grad else item
            if tensor is None:
                self._places.append((distributed.layout_of(item), None))
            elif id(tensor) not in found:
                self._places.append((distributed.layout_of(tensor), len(found)))
                found[id(tensor)] = tensor
        self.all = list(found.values())
        self.local = _local(distributed.locals_of(self.all), "tensors", take_grad=False)
        self.count, self.complex, self.double = len(items), self.local.complex, self.local.double

    @property
    def rest(self) -> Any:
        """The local parts that the kernel does not take."""
        return self.local.rest

    def written(self) -> Any:
        """The local batch, for a change in place that the tensors it belongs to shall know of."""
        sharded = [tensor for tensor in self.all if distributed.is_sharded(tensor)]
        torch.autograd.graph.increment_version(sharded)
        return self.local

    def norm(self, p: float) -> float | Tensor:
        """The norm of all the tensors on all ranks."""
        held = self._held()
        by_layout: dict[distributed.Layout | None, list[Tensor]] = {}
        for layout, place in self._places:
            by_layout.setdefault(layout, []).extend([] if place is None else [held[place]])
        vectors = {layout: self._vector([_norm_of(tensors, p)]) for layout, tensors in by_layout.items()}
        joint = distributed.across_meshes(vectors, p)
        total = combine_tensors(torch.cat([self._vector([distributed.neutral(p)]), *joint.values()]), p)
        return self._numbers(distributed.across_groups(total, self._groups, p).reshape(1))[0]

    def norms(self, p: float) -> list[float | Tensor]:
        """The norm of each tensor, with the parts of it that other ranks hold."""
        held = self._held()
        by_layout: dict[distributed.Layout | None, list[int | None]] = {}
        for layout, place in self._places:
            by_layout.setdefault(layout, []).append(place)
        vectors = {
            layout: self._vector([_norm_of([] if i is None else [held[i]], p) for i in places])
            for layout, places in by_layout.items()
        }
        of_all: list[Any] = [None] * len(self.all)
        for layout, joint in distributed.across_meshes(vectors, p).items():
            for i, value in zip(by_layout[layout], self._numbers(joint), strict=True):
                if i is not None:
                    of_all[i] = value
        return of_all

    def _held(self) -> Sequence[Tensor]:
        """What this rank holds of each tensor, to be measured: reduced if that is pending."""
        if not any(map(distributed.is_partial, self.all)):
            return self.local.all  # type: ignore[no-any-return]
        return distributed.locals_of(distributed.without_partial(self.all))

    def _vector(self, values: Sequence[float | Tensor]) -> Tensor:
        """Norms as a float64 tensor of one dimension, where ranks exchange it."""
        mesh = next((layout.mesh for layout, _ in self._places if layout is not None), None)
        device = mesh.device_type if mesh else next((t.device for t in self.local.all), "cpu")
        return torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])

    def _numbers(self, vector: Tensor) -> list[float | Tensor]:
        """The elements of a vector: floats, if nobody has to wait for the tensors' device."""
        return vector.tolist() if eager.on_host(self.local.all) else list(vector)


def _norm_of(tensors: list[Tensor], p: float) -> float | Tensor:
    """The norm of what this rank holds, the neutral one if that is nothing."""
    if not any(tensor.numel() for tensor in tensors):
        return distributed.neutral(p)
    return norm(_local(tensors, "tensors", take_grad=False), p)


def refuse_expanded(tensors: Iterable[Tensor]) -> None:
    """Raise torch's error for tensors whose elements share memory, before anything is written."""
    for tensor in tensors:
        if tensor.layout == torch.strided and any(
            stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        ):
            raise RuntimeError(
                "unsupported operation: more than one element of the written-to tensor refers to a single "
                f"memory location (a gradient of shape {tuple(tensor.shape)} is expanded). Please clone() "
                "the tensor before performing the operation."
            )


def norm(batch: Any, p: float) -> float | Tensor:
    """The norm of the whole batch: a float, or a float64 tensor where a device must not be waited for."""
    if type(batch) is Sharded:
        return batch.norm(p)
    rest = batch.rest
    if p not in _KERNEL_ORDERS:
        return eager.norm(batch.all, p) if batch.all else 0.0
    if not rest:
        return batch.norm(p, _threads())  # type: ignore[no-any-return]
    of_rest = eager.norm(rest, p)
    if len(rest) == len(batch.all):
        return of_rest
    of_kernel = batch.norm(p, _threads())
    if isinstance(of_rest, Tensor):
        return eager.norm([of_rest, of_rest.new_tensor(of_kernel)], p)
    return combine([of_kernel, of_rest], p)


def norms(batch: Any, p: float) -> list[float | Tensor]:
    """The norm of each tensor of the batch, in order: floats, or float64 tensors as in :func:`norm`."""
    if type(batch) is Sharded:
        return batch.norms(p)
    if p not in _KERNEL_ORDERS:
        return eager.norms(batch.all, p)
    of_all: list[float | Tensor | None] = batch.norms(p, _threads())
    of_rest = iter(eager.norms(batch.rest, p))
    return [next(of_rest) if n is None else n for n in of_all]


def scale_(batch: Any, factor: float | Tensor) -> None:
    """Multiply every tensor of the batch in place; by 1.0, which would change nothing, not at all."""
    if isinstance(factor, float) and factor == 1.0:
        return
    if type(batch) is Sharded:
        batch = batch.written()
    if len(batch.rest) < len(batch.all):
        batch.scale(float(factor), _threads())
    if batch.rest:
        eager.scale_(batch.rest, factor)


def scale_each_(batch: Any, factors: Sequence[float | Tensor]) -> None:
    """Multiply each tensor of the batch in place by its own factor; by 1.0 not at all."""
    if type(batch) is Sharded:
        batch = batch.written()
    changes = [None if isinstance(f, float) and f == 1.0 else f for f in factors]
    if len(batch.rest) < len(batch.all):
        batch.scale_each([None if f is None else float(f) for f in changes], _threads())
    if batch.rest:
        of_tensor = {id(t): f for t, f in zip(batch.all, changes, strict=True)}
        for tensor in batch.rest:
            factor = of_tensor[id(tensor)]
            if factor is not None:
                eager.scale_([tensor], factor)


def clamp_(batch: Any, limit: float) -> None:
    """Limit every element of the batch in place to ``[-limit, limit]``."""
    if type(batch) is Sharded:
        batch = batch.written()
    batch.clamp(limit, _threads())
    eager.clamp_(batch.rest, limit)
