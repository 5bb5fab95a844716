"""Tensors of which this rank may have only parts: norms on which all ranks agree."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import repeat
from typing import Any, cast

import torch
from torch import Tensor

from torchclip._core import mesh, rounds
from torchclip._core.batch import Batch, Facts, Norm, Norms
from torchclip._core.collectives import Call, Kind
from torchclip._core.mesh import Layout
from torchclip._core.rounds import Held
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
    layouts = mesh.layouts_of(with_layout)
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
    ) -> None:
        tensors, is_tied, self._places = _placed(items, take_grad)
        super().__init__(tensors, is_tied)
        self.groups = groups
        self.is_changed = take_grad and not measured
        self._gather = gather
        self._locals = mesh.locals_of(tensors)
        self.local = gather(self._locals)
        self.rest = self.local.rest
        self._is_pending = any(layout.is_pending for layout in self._places)
        self.joint_facts: int | None = None

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

    def held(self, number: int, p: float, finite: bool) -> list[Held]:
        """This rank's tensors to measure; gradients that are pending a reduction are reduced first.

        Args:
            number: the number of this batch in the call.
            p: the order of the norms.
            finite: whether only finite elements count.
        """
        held = self._locals
        if finite:
            self._refuse_partial("zeroing non-finite elements")
        if self._is_pending:
            held = mesh.locals_of(mesh.without_partial(self.all))
        of_each: list[Norms] = []

        def norm(places: Sequence[int | None]) -> Norm:
            if len(self._places) == 1 and not self._is_pending:
                return self.local.norm(p, finite)
            chosen = [held[i] for i in dict.fromkeys(places) if i is not None]
            return self._gather(chosen).norm(p, finite)

        def norms(places: Sequence[int | None]) -> Norms:
            if not of_each:
                of_each.append(self._gather(held).norms(p, finite))
            return at(of_each[0], places)

        return [
            Held(number, layout, places, partial(norm, places), partial(norms, places))
            for layout, places in self._places.items()
        ]

    def scale_(self, clip_coef: Norm, /) -> None:
        """Multiply this rank's part of every tensor in place."""
        if may_change(clip_coef):
            self._written().scale_(clip_coef)

    def scale_each_(self, clip_coefs: Norms, /) -> None:
        """Multiply this rank's part of each tensor in place by its own number."""
        self._written().scale_each_(clip_coefs)

    def clamp_(self, limit: float, /) -> None:
        """Limit every element on this rank in place to ``[-limit, limit]``."""
        self._refuse_partial("clipping by value")
        self._written().clamp_(limit)

    def zero_nonfinite_(self) -> None:
        """Set every infinite or NaN element on this rank to 0."""
        self._written().zero_nonfinite_()

    def _written(self) -> Batch:
        """The local batch for a change in place; DTensors' version counters are incremented afterwards."""
        is_mixed = mesh.PLAIN in self._places
        written = [tensor for tensor in self.all if mesh.is_dtensor(tensor)] if is_mixed else self.all
        torch.autograd.graph.increment_version(written)
        return self.local

    def _refuse_partial(self, what: str) -> None:
        """Raise an error for tensors that are pending a reduction, as their elements are not known yet."""
        for i, tensor in enumerate(self.all if self._is_pending else []):
            if mesh.is_dtensor(tensor) and mesh.is_partial(tensor):
                raise TypeError(
                    f"{what} needs the elements of gradient {i} of shape {tuple(tensor.shape)}, but it is "
                    f"pending a reduction over ranks ({tensor.placements}); reduce it first "
                    "(`p.grad = p.grad.redistribute(placements=p.placements)`)"
                )


def norms_of(batches: Sequence[ShardedBatch], each: bool, p: float, finite: bool) -> list[Norm] | list[Norms]:
    """The norm of each of several batches, or with ``each`` the norms of its tensors, in one exchange."""
    held = [some for i, batch in enumerate(batches) for some in batch.held(i, p, finite)]
    if batches[0].is_changed:
        kind = Kind.CLIP_EACH if each else Kind.CLIP
    else:
        kind = Kind.MEASURE_EACH if each else Kind.MEASURE
    call = Call(kind, p, reduce(operator.or_, (batch.own_facts for batch in batches)))
    joint: Any = (
        rounds.each(held, call) if each else rounds.totals(held, len(batches), batches[0].groups, call)
    )
    call.finish()
    for batch in batches:
        batch.joint_facts = call.facts
    if not each:
        return cast("list[Norm]", joint)
    in_order: list[list[Norm]] = [[ABSENT] * len(batch.all) for batch in batches]
    for some, norms in zip(held, joint, strict=True):
        for i, norm in zip(some.places, norms, strict=True):
            if i is not None:
                in_order[some.batch][i] = norm
    return [in_one(norms) for norms in in_order]


def refuse(several: Sequence[Sequence[Tensor]], groups: Sequence[Any], kind: int) -> None:
    """Tell the ranks that wait for this one that it refused its arguments, so that all raise an error.

    Args:
        several: the parameters, or tensors, of each batch of the call.
        groups: the process groups of the call.
        kind: of ``Kind``: the kind of the call.
    """
    call = Call(kind, 0.0)
    call.fail("refused")
    if kind == Kind.ADAPT:
        items = list(dict.fromkeys(item for items in several for item in items))
        mesh.without_partial([item.grad for item in items if item.grad is not None])  # by all ranks, too
        lengths: Counter[Layout] = Counter()
        for item, part in zip(items, mesh.locals_of(items), strict=True):
            lengths[mesh.unit_layout(item)] += 2 * (len(part) if part.dim() > 1 else 1)  # as in ``units``
        nothing = {
            layout: torch.full((n,), ABSENT, dtype=torch.float64, device="cpu")
            for layout, n in lengths.items()
            if layout.dims
        }
        rounds.lines(nothing, call)
        return
    involved = [list(dict.fromkeys(items)) for items in several if groups or mesh.any_dtensor(items)]
    held = []
    for i, some in enumerate(involved):
        tensors, _, places = _placed(some, take_grad=kind != Kind.MEASURE)
        mesh.without_partial(tensors)  # which involves all ranks, too
        held += [rounds.absent(i, *alike) for alike in places.items()]
    if involved and kind in (Kind.CLIP, Kind.MEASURE):
        rounds.totals(held, len(involved), groups, call)
    elif involved:
        rounds.each(held, call)
