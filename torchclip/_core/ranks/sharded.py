"""Tensors of which this rank may have only parts: norms on which all ranks agree."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import repeat
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchclip._core.batch import Batch, Facts, Norm, Norms
from torchclip._core.ranks import meshes, plan
from torchclip._core.ranks.exchange import Call, Kind
from torchclip._core.ranks.meshes import Layout
from torchclip._core.ranks.plan import Part
from torchclip._core.scalars import ABSENT, at, in_one, may_change


def _placed(
    items: Sequence[Tensor], take_grad: bool
) -> tuple[list[Tensor], bool, dict[Layout, list[int | None]]]:
    """How the tensors of a call lie.

    Args:
        items: distinct parameters or tensors.
        take_grad: whether the gradients of the items are meant.

    Returns:
        The distinct tensors on this rank; whether any is the gradient of several parameters; and the layouts,
        in the same order on every rank, with the positions of the tensors that have them: None for a tensor
        that is not on this rank but may be on others.
    """
    grads: list[Any] = [item.grad for item in items] if take_grad else list(items)
    lacking = any(map(operator.is_, grads, repeat(None)))
    here = [grad for grad in grads if grad is not None] if lacking else grads
    different: list[Tensor] = list(dict(zip(map(id, here), here, strict=True)).values())
    is_tied = len(different) < len(here)
    positions: Sequence[int | None] = range(len(grads))
    with_layout = grads
    if lacking or is_tied:
        place_of = {id(grad): place for place, grad in enumerate(different)}
        positions = [place_of.get(id(grad)) for grad in grads]
        with_layout = [item if grad is None else grad for item, grad in zip(items, grads, strict=True)]
    layouts = meshes.layouts_of(with_layout)
    of_each = dict(zip(map(id, layouts), layouts, strict=True))
    places: dict[Layout, list[int | None]] = {}
    places_of = {key: places.setdefault(layout, []) for key, layout in of_each.items()}
    if len(of_each) == 1:  # such as a model that FSDP2 shards as a whole
        places_of[id(layouts[0])].extend(positions)
    else:
        for layout, position in zip(layouts, positions, strict=True):
            places_of[id(layout)].append(position)
    return different, is_tied, places


class ShardedBatch(Batch):
    """Plain tensors and DTensors, including the parts on other ranks.

    Args:
        items: distinct parameters or tensors.
        take_grad: whether the gradients of the items are meant.
        groups: process groups whose ranks have further gradients.
        gather: makes a batch of this rank's tensors.
        measured: whether gradients are only measured.
        given: what the user passed for the items.

    Attributes:
        local: the batch of this rank's parts.
        joint_facts: the ``Facts`` of all ranks, once a norm was taken.
    """

    def __init__(
        self,
        items: Sequence[Tensor],
        take_grad: bool,
        groups: Sequence[Any],
        gather: Callable[[list[Tensor]], Batch],
        measured: bool = False,
        given: Any = None,
    ) -> None:
        tensors, is_tied, self._places = _placed(items, take_grad)
        super().__init__(tensors, is_tied)
        self.groups = groups
        self.is_changed = take_grad and not measured
        self._items, self._given, self._gather = items, given, gather
        self._locals = self._measured = meshes.locals_of(tensors)
        self.local = gather(self._locals)
        self.rest = self.local.rest
        self._is_pending = any(layout.is_pending for layout in self._places)
        self.joint_facts: int | None = None
        if self.is_changed:
            self._refuse_pending("scaling", {"product"})

    @property
    def facts(self) -> int:
        """``Facts`` of the tensors on this rank; once a norm was taken, on all ranks."""
        return (self.own_facts if self.joint_facts is None else self.joint_facts) | Facts.SHARDED

    @property
    def own_facts(self) -> int:
        """``Facts`` of the tensors on this rank."""
        return self.local.facts | self._tied

    def norm(self, p: float, finite: bool = False, /) -> Norm:
        """The norm of all the tensors on all ranks."""
        return cast("Norm", norms_of([self], False, p, finite)[0])

    def norms(self, p: float, finite: bool = False, /) -> Norms:
        """The norm of each tensor, including its parts on other ranks."""
        return cast("Norms", norms_of([self], True, p, finite)[0])

    def parts(self, number: int) -> list[Part]:
        """The tensors by their layouts; ``number`` is that of this batch in the call."""
        return [Part(number, layout, places) for layout, places in self._places.items()]

    def lacking(self) -> list[str]:
        """The replicas whose gradients this rank lacks."""
        if not any(None in places for layout, places in self._places.items() if layout.replicas > 1):
            return []
        lacking = [(i, item) for i, item in enumerate(self._items) if item.grad is None]
        layouts = meshes.layouts_of([item for _, item in lacking])
        names = {}
        if isinstance(self._given, nn.Module):
            names = {id(p): repr(name) for name, p in self._given.named_parameters()}
        return [
            f"{names.get(id(item), f'parameter {i}')} of shape {tuple(item.shape)}"
            for (i, item), layout in zip(lacking, layouts, strict=True)
            if layout.replicas > 1
        ]

    def reduce_pending(self) -> None:
        """Reduce what is pending a reduction, into copies to measure."""
        if self._is_pending:
            self._measured = meshes.locals_of(meshes.without_partial(self.all))

    def measured(self, each: bool, p: float, finite: bool) -> list[Norm] | list[Norms]:
        """The norm of this rank's part of all tensors of a layout, or with ``each`` of each tensor.

        Args:
            each: whether to measure each tensor.
            p: the order of the norms.
            finite: whether only finite elements count.
        """
        if finite:
            self._refuse_pending("zeroing non-finite elements")
        whole = self._gather(self._measured) if self._is_pending else self.local
        if each:
            of_each = whole.norms(p, finite)
            return [at(of_each, places) for places in self._places.values()]
        if len(self._places) == 1:
            return [whole.norm(p, finite)]
        chosen = [dict.fromkeys(i for i in places if i is not None) for places in self._places.values()]
        return [self._gather([self._measured[i] for i in places]).norm(p, finite) for places in chosen]

    def scale_(self, clip_coef: Norm, /) -> None:
        """Multiply this rank's part of every tensor in place."""
        if may_change(clip_coef):
            self._written().scale_(clip_coef)

    def scale_each_(self, clip_coefs: Norms, /) -> None:
        """Multiply this rank's part of each tensor in place by its own number."""
        self._written().scale_each_(clip_coefs)

    def clamp_(self, limit: float, /) -> None:
        """Limit every element on this rank in place to ``[-limit, limit]``."""
        self._refuse_pending("clipping by value")
        self._written().clamp_(limit)

    def zero_nonfinite_(self) -> None:
        """Set every infinite or NaN element on this rank to 0."""
        self._written().zero_nonfinite_()

    def _written(self) -> Batch:
        """The local batch for a change in place; DTensors' version counters are incremented afterwards."""
        is_mixed = meshes.PLAIN in self._places
        written = [tensor for tensor in self.all if meshes.is_dtensor(tensor)] if is_mixed else self.all
        torch.autograd.graph.increment_version(written)
        return self.local

    def _refuse_pending(self, what: str, ops: set[str] | None = None) -> None:
        """Raise an error for tensors that are pending a reduction, or one of some reductions."""
        for i, tensor in enumerate(self.all if self._is_pending else []):
            pending = meshes.pending(tensor)
            if pending if ops is None else pending & ops:
                raise TypeError(
                    f"{what} needs the elements of gradient {i} of shape {tuple(tensor.shape)}, but it is "
                    f"pending a reduction over ranks ({', '.join(pending)}); reduce it first "
                    "(`p.grad = p.grad.redistribute(placements=p.placements)`)"
                )


def norms_of(
    batches: Sequence[ShardedBatch], each: bool, p: float, finite: bool, kind: int | None = None
) -> list[Norm] | list[Norms]:
    """The norm of each of several batches, or with ``each`` the norms of its tensors, in one exchange.

    If this rank fails to measure its parts, all ranks raise an error.
    """
    if kind is None and batches[0].is_changed:
        kind = Kind.CLIP_EACH if each else Kind.CLIP
    call = Call(kind or (Kind.MEASURE_EACH if each else Kind.MEASURE), p)
    parts = [part for i, batch in enumerate(batches) for part in batch.parts(i)]
    for batch in batches:
        batch.reduce_pending()
    try:
        norms: list[Any] = [norm for batch in batches for norm in batch.measured(each, p, finite)]
        call.facts = reduce(operator.or_, (batch.own_facts for batch in batches))
        call.lacking = ", ".join(name for batch in batches for name in batch.lacking())
    except Exception:
        _tell(parts, len(batches), batches[0].groups, call)
        raise
    joint: Any = (
        plan.each(parts, norms, call)
        if each
        else plan.totals(parts, norms, len(batches), batches[0].groups, call)
    )
    call.finish()
    for batch in batches:
        batch.joint_facts = call.facts
    if not each:
        return cast("list[Norm]", joint)
    in_order: list[list[Norm]] = [[ABSENT] * len(batch.all) for batch in batches]
    for part, norms in zip(parts, joint, strict=True):
        for i, norm in zip(part.places, norms, strict=True):
            if i is not None:
                in_order[part.batch][i] = norm
    return [in_one(of_batch) for of_batch in in_order]


def norms_of_split(
    parameters: Sequence[Tensor], p: float, gather: Callable[[list[Tensor]], Batch]
) -> list[tuple[Norm, Norm]]:
    """The norms of parameters that are split over ranks, and of their gradients (``ABSENT`` for none)."""
    grads = ShardedBatch(parameters, True, (), gather)
    weights = ShardedBatch([parameter.detach() for parameter in parameters], False, (), gather)
    of_grads, of_weights = cast("list[Norms]", norms_of([grads, weights], True, p, False, Kind.ADAPT))
    place_of = {id(grad): place for place, grad in enumerate(grads.all)}
    places = [place_of.get(id(parameter.grad)) for parameter in parameters]
    return list(zip(of_weights, at(of_grads, places), strict=True))


def refuse(several: Sequence[Sequence[Tensor]], groups: Sequence[Any], kind: int, order: float) -> None:
    """Tell the ranks that wait for this one that it refused its arguments, so that all raise an error.

    Args:
        several: the parameters, or tensors, of each batch of the call.
        groups: the process groups of the call.
        kind: of ``Kind``: the kind of the call.
        order: the order of the norms, which ranks on accelerators need to know.
    """
    involved = [list(dict.fromkeys(items)) for items in several if groups or meshes.any_dtensor(items)]
    with_grads = [kind != Kind.MEASURE] * len(involved)
    if kind == Kind.ADAPT:  # as of ``norms_of_split``
        (items,) = involved or [[]]
        split, rest = meshes.vectors_split(items)
        meshes.without_partial([item.grad for item in rest if item.grad is not None])
        involved, with_grads = ([split, split], [True, False]) if split else ([], [])
    parts = []
    for i, (items, take_grad) in enumerate(zip(involved, with_grads, strict=True)):
        tensors, _, places = _placed(items, take_grad)
        meshes.without_partial(tensors)  # by all ranks, too
        parts += [Part(i, *alike) for alike in places.items()]
    if involved:
        _tell(parts, len(involved), groups, Call(kind, order))


def _tell(parts: Sequence[Part], count: int, groups: Sequence[Any], call: Call) -> None:
    """Take part in the exchanges of a call with nothing but a refusal."""
    call.fail("refused")
    if call.kind in (Kind.CLIP, Kind.MEASURE):
        plan.totals(parts, [ABSENT] * len(parts), count, groups, call)
    else:
        plan.each(parts, [[ABSENT] * len(part.places) for part in parts], call)
