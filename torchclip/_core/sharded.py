"""Tensors of which this rank may hold only parts: norms that all ranks agree on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchclip._core import collectives, mesh
from torchclip._core.batch import Batch, Facts, Norm, Norms
from torchclip._core.scalars import ABSENT, on_device

__all__ = ["ShardedBatch"]

_CPU = torch.device("cpu")


class ShardedBatch:
    """Plain tensors and DTensors with what other ranks hold of them; a ``Batch``.

    Args:
        items: parameters or tensors.
        take_grad: whether the gradients of the items are meant.
        groups: process groups whose ranks hold further gradients.
        gather: makes a batch of what this rank holds: of tensors, and whether any is shared.
    """

    def __init__(
        self,
        items: Sequence[Tensor],
        take_grad: bool,
        groups: Sequence[Any],
        gather: Callable[[list[Tensor], bool], Batch],
    ) -> None:
        self.all: list[Tensor] = []
        self._groups = groups
        self._gather = gather
        # How tensors lie, in the order of the items on every rank, and which of `all` do: None stands for one
        # that is not here, but may be on other ranks.
        self._places: dict[mesh.Layout | None, list[int | None]] = {}
        self._partial = False
        self._dtensors: list[Tensor] = []
        shared = self._place(items, take_grad)
        self._locals = mesh.locals_of(self.all)
        self._local = gather(self._locals, shared)
        self._joint_facts: int | None = None

    def _place(self, items: Sequence[Tensor], take_grad: bool) -> bool:
        """Note how each tensor lies; returns whether one is the gradient of several parameters."""
        place_of: dict[int, int] = {}
        places_like: dict[Any, list[int | None]] = {}
        dtensor = mesh.dtensor_types()
        with_gradient = 0
        for item in dict.fromkeys(items):
            grad = item.grad if take_grad else item
            tensor = item if grad is None else grad
            sharded = isinstance(tensor, dtensor)
            like = (id(tensor.device_mesh), tensor.placements) if sharded else None  # type: ignore[attr-defined]
            places = places_like.get(like)
            if places is None:
                layout = mesh.layout_of(tensor)
                places = places_like[like] = self._places.setdefault(layout, [])
                self._partial |= mesh.is_partial(tensor)
            if grad is None:
                places.append(None)
                continue
            with_gradient += 1
            places.append(place_of.setdefault(id(grad), len(self.all)))
            if len(place_of) > len(self.all):
                self.all.append(grad)
                if sharded:
                    self._dtensors.append(grad)
        return with_gradient > len(self.all)

    @property
    def facts(self) -> int:
        """``Facts`` of the tensors on this rank and, once a norm was taken, on all ranks."""
        known = self._local.facts if self._joint_facts is None else self._joint_facts
        return known | Facts.SHARDED

    def norm(self, p: float, finite: bool = False, /) -> Norm:
        """The norm of all the tensors on all ranks."""
        held = self._held(finite)
        norms = {
            layout: self._norm_of([held[i] for i in dict.fromkeys(places) if i is not None], p, finite)
            for layout, places in self._places.items()
        }
        norm, self._joint_facts = collectives.total(norms, self._local.facts, self._groups, p)
        return norm

    def norms(self, p: float, finite: bool = False, /) -> Norms:
        """The norm of each tensor, with the parts of it that other ranks hold."""
        held = self._gather(list(self._held(finite)), False).norms(p, finite)
        device = held.device if isinstance(held, Tensor) else _CPU
        vectors = {
            layout: on_device([ABSENT if i is None else held[i] for i in places], device)
            for layout, places in self._places.items()
            if layout is not None
        }
        joint, self._joint_facts = collectives.across_meshes(vectors, self._local.facts, p)
        if not vectors:
            return held
        of_all: list[Norm] = list(held)
        for layout, vector in joint.items():
            values = vector.tolist() if isinstance(held, list) else vector
            for i, value in zip(self._places[layout], values, strict=True):
                if i is not None:
                    of_all[i] = value
        if isinstance(held, Tensor):
            return on_device(of_all, device)
        return [float(norm) for norm in of_all]

    def _held(self, finite: bool) -> Sequence[Tensor]:
        """What this rank holds of each tensor, to be measured: reduced if that is pending."""
        if finite:
            self._refuse_partial("zeroing non-finite elements")
        if not self._partial:
            return self._locals
        return mesh.locals_of(mesh.without_partial(self.all))

    def _norm_of(self, tensors: list[Tensor], p: float, finite: bool) -> Norm:
        """The norm of some of what this rank holds."""
        whole = not self._partial and len(tensors) == len(self.all)
        return (self._local if whole else self._gather(tensors, False)).norm(p, finite)

    def scale_(self, clip_coef: Norm, /) -> None:
        """Multiply what this rank holds of every tensor in place."""
        if isinstance(clip_coef, Tensor) or clip_coef != 1.0:
            self._written().scale_(clip_coef)

    def scale_each_(self, clip_coefs: Norms, /) -> None:
        """Multiply what this rank holds of each tensor in place by its own number."""
        self._written().scale_each_(clip_coefs)

    def clamp_(self, limit: float, /) -> None:
        """Limit every element that this rank holds in place to ``[-limit, limit]``."""
        self._refuse_partial("clipping by value")
        self._written().clamp_(limit)

    def zero_nonfinite_(self) -> None:
        """Put 0 in the place of every infinite or NaN element that this rank holds."""
        self._written().zero_nonfinite_()

    def _written(self) -> Batch:
        """The local batch, for a change in place that the tensors it belongs to shall know of."""
        torch.autograd.graph.increment_version(self._dtensors)
        return self._local

    def _refuse_partial(self, what: str) -> None:
        """Raise an error for tensors pending a reduction, whose elements are not known before it."""
        for i, tensor in enumerate(self.all if self._partial else []):
            if mesh.is_dtensor(tensor) and mesh.is_partial(tensor):
                raise TypeError(
                    f"{what} needs the elements of gradient {i} of shape {tuple(tensor.shape)}, but it is "
                    f"pending a reduction over ranks ({tensor.placements}); reduce it first "
                    "(`p.grad = p.grad.redistribute(placements=p.placements)`)"
                )
