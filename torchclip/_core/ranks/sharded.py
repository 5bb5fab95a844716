"""Tensors of which this rank may have only parts: norms on which all ranks agree.

Ranks that share a mesh over which a tensor is split exchange one number for everything on that mesh, and then
those that ``group`` connects exchange theirs, which include what lies on meshes within these ranks.  Replicas
count once: of the ranks with replicas, the first sends its norm, the others ``ABSENT``.

All ranks of a mesh have the same parameters on it, so that all of them come to the same plan, and follow it
to its end also if one of the exchanges fails.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from itertools import islice
from typing import Any, NamedTuple, cast
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchclip._core import joint_norms
from torchclip._core.batch import Batch, Facts, Norm, Norms
from torchclip._core.memory import not_compiled
from torchclip._core.ranks import meshes
from torchclip._core.ranks.exchange import Call, Kind, connected, exchange
from torchclip._core.ranks.meshes import Layout, Ranks
from torchclip._core.scalars import ABSENT, at, concatenate, in_one, may_change


class Part(NamedTuple):
    """The tensors of a batch that have the same layout.

    Attributes:
        batch: the number of the batch in the call.
        layout: the layout.
        places: their positions in the batch; None in place of a tensor that is not on this rank.
    """

    batch: int
    layout: Layout
    places: Sequence[int | None]


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
        tensors, is_shared, self._places = _placed(items, take_grad)
        super().__init__(tensors, is_shared)
        self.groups = groups
        self.is_changed = take_grad and not measured
        self._items, self._given, self._gather = items, given, gather
        self._locals = self._measured = meshes.locals_of(tensors)
        self.local = gather(self._locals)
        self.rest = self.local.rest
        self._is_pending = any(layout.is_pending for layout in self._places)
        self.joint_facts: int | None = None
        if self.is_changed:
            self.check_not_pending("scaling", {"product"})

    @property
    def facts(self) -> int:
        """``Facts`` of the tensors on this rank; once a norm was taken, on all ranks."""
        return (self.own_facts if self.joint_facts is None else self.joint_facts) | Facts.SHARDED

    @property
    def own_facts(self) -> int:
        """``Facts`` of the tensors on this rank."""
        return self.local.facts | self._shared

    def norm(self, p: float, /) -> Norm:
        """The norm of all the tensors on all ranks."""
        return cast("Norm", norms_of([self], False, p)[0])

    def norms(self, p: float, /) -> Norms:
        """The norm of each tensor, including its parts on other ranks."""
        return cast("Norms", norms_of([self], True, p)[0])

    def parts(self, number: int) -> list[Part]:
        """The tensors by their layouts; ``number`` is the number of this batch in the call."""
        return [Part(number, layout, places) for layout, places in self._places.items()]

    def lacking(self) -> list[str]:
        """The replicas whose gradients this rank lacks."""
        if not any(None in places for layout, places in self._places.items() if layout.replicas > 1):
            return []
        named = self._given.named_parameters() if isinstance(self._given, nn.Module) else ()
        names = {id(p): repr(name) for name, p in named}
        return [
            f"{names.get(id(item), f'parameter {i}')} of shape {tuple(item.shape)}"
            for i, (item, layout) in enumerate(zip(self._items, meshes.layouts_of(self._items), strict=True))
            if item.grad is None and layout.replicas > 1
        ]

    def reduce_pending(self) -> None:
        """Reduce what is pending a reduction, into copies to measure."""
        if self._is_pending:
            self._measured = meshes.reduced_locals_of(self.all)

    def measured(self, each: bool, p: float) -> list[Norm] | list[Norms]:
        """For each layout the norm of this rank's part, or with ``each`` the norms of the tensors."""
        for i, tensor in enumerate(self._measured if self.rest else []):
            if tensor.is_meta:
                raise TypeError(
                    f"gradient {i} of shape {tuple(tensor.shape)} is on the device 'meta', where it has no "
                    "values for other ranks; put it where the others are"
                )
        whole = self._gather(self._measured) if self._is_pending else self.local
        if each:
            of_each = whole.norms(p)
            return [at(of_each, places) for places in self._places.values()]
        if len(self._places) == 1:
            return [whole.norm(p)]
        chosen = [dict.fromkeys(i for i in places if i is not None) for places in self._places.values()]
        return [self._gather([self._measured[i] for i in places]).norm(p) for places in chosen]

    def scale_(self, clip_coef: Norm, /) -> None:
        """Multiply this rank's part of every tensor in place."""
        if may_change(clip_coef):
            self._written().scale_(clip_coef)

    def scale_each_(self, clip_coefs: Norms, /) -> None:
        """Multiply this rank's part of each tensor in place by its own number."""
        self._written().scale_each_(clip_coefs)

    def clamp_(self, limit: float, /) -> None:
        """Limit every element on this rank in place to ``[-limit, limit]``."""
        self.check_not_pending("clipping by value")
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

    def check_not_pending(self, what: str, ops: set[str] | None = None) -> None:
        """Raise an error for tensors that are pending a reduction, or one of some reductions."""
        for i, tensor in enumerate(self.all if self._is_pending else []):
            pending = meshes.pending(tensor)
            if pending if ops is None else pending & ops:
                raise TypeError(
                    f"{what} needs the elements of gradient {i} of shape {tuple(tensor.shape)}, but it is "
                    f"pending a reduction over ranks ({', '.join(pending)}); reduce it first "
                    "(`p.grad = p.grad.redistribute(placements=p.placements)`)"
                )


def norms_of(batches: Sequence[ShardedBatch], each: bool, p: float) -> list[Norm] | list[Norms]:
    """The norm of each of several batches, or with ``each`` the norms of its tensors, in one exchange.

    If this rank fails to measure its parts, all ranks raise an error.
    """
    kinds = (Kind.CLIP, Kind.CLIP_EACH) if batches[0].is_changed else (Kind.MEASURE, Kind.MEASURE_EACH)
    call = Call(kinds[each], p)
    parts = [part for i, batch in enumerate(batches) for part in batch.parts(i)]
    for batch in batches:
        batch.reduce_pending()
    try:
        norms: list[Any] = [norm for batch in batches for norm in batch.measured(each, p)]
        call.facts = reduce(operator.or_, (batch.own_facts for batch in batches))
        call.lacking = ", ".join(name for batch in batches for name in batch.lacking())
    except Exception:
        _tell(parts, len(batches), batches[0].groups, call)
        raise
    joint: Any = (
        _each(parts, norms, len(batches), call)
        if each
        else _totals(parts, norms, len(batches), batches[0].groups, call)
    )
    if call.error is not None:
        raise RuntimeError(call.error)
    for batch in batches:
        batch.joint_facts = call.facts
    return cast("list[Norm] | list[Norms]", joint)


def tell_refusal(several: Sequence[Sequence[Tensor]], groups: Sequence[Any], kind: str) -> None:
    """Tell the ranks that wait for this one that it refused the arguments of a call.

    Args:
        several: the parameters, or tensors, of each batch of the call.
        groups: the process groups of the call.
        kind: of ``Kind``.
    """
    involved = [list(dict.fromkeys(items)) for items in several if groups or meshes.any_dtensor(items)]
    parts = []
    for i, items in enumerate(involved):
        tensors, _, places = _placed(items, take_grad=kind != Kind.MEASURE)
        meshes.reduced_locals_of(tensors)  # by all ranks, too
        parts += [Part(i, *alike) for alike in places.items()]
    if involved:
        _tell(parts, len(involved), groups, Call(kind, 2.0))


def _tell(parts: Sequence[Part], count: int, groups: Sequence[Any], call: Call) -> None:
    """Take part in the exchanges of a call with nothing but a refusal."""
    call.fail("refused")
    if call.kind in (Kind.CLIP, Kind.MEASURE):
        _totals(parts, [ABSENT] * len(parts), count, groups, call)
    else:
        _each(parts, [[ABSENT] * len(part.places) for part in parts], count, call)


def _placed(
    items: Sequence[Tensor], take_grad: bool
) -> tuple[list[Tensor], bool, dict[Layout, list[int | None]]]:
    """How the distinct items of a call, or their gradients, lie.

    Returns:
        The distinct tensors on this rank; whether any is the gradient of several parameters; and the layouts,
        in the same order on every rank, with the positions of the tensors that have them: None for a tensor
        that is not on this rank but may be on others.
    """
    grads: list[Any] = [item.grad for item in items] if take_grad else list(items)
    here = [grad for grad in grads if grad is not None]
    different = {id(grad): grad for grad in here}
    place_of = {key: place for place, key in enumerate(different)}
    layouts = meshes.layouts_of(
        [item if grad is None else grad for item, grad in zip(items, grads, strict=True)]
    )
    positions = [*map(place_of.get, map(id, grads))]
    # By identity, as a layout's hash takes longer than all else here.
    of_each = {id(layout): layout for layout in layouts}
    equal: dict[Layout, Layout] = {}
    of_each = {key: equal.setdefault(layout, layout) for key, layout in of_each.items()}
    if len(equal) < len(of_each):
        layouts = [of_each[id(layout)] for layout in layouts]
    places = {
        layout: [place for place, each in zip(positions, layouts, strict=True) if each is layout]
        for layout in equal
    }
    return list(different.values()), len(different) < len(here), places


# The plan of a call


@not_compiled
def _totals(
    parts: Sequence[Part], norms: Sequence[Norm], count: int, groups: Sequence[dist.ProcessGroup], call: Call
) -> list[Norm]:
    """The norm of each batch over all ranks that share its meshes, or that a group connects.

    They have the same bits on each of those ranks; ``ABSENT`` if none has any element.

    Args:
        parts: what this rank holds of the batches.
        norms: the norm of each of them.
        count: the number of batches.
        groups: process groups whose other ranks have other plain tensors, and DTensors on other meshes.
        call: the call; it has the facts of all those ranks afterwards.
    """
    # A group of all ranks connects what others connect, too.
    groups = [group for group in groups if group.size() == dist.get_world_size()][:1] or groups
    among = connected(groups, call) if groups else frozenset([dist.get_rank()])
    by_mesh = _by_mesh(parts, among)

    def of_batches(some: Iterable[tuple[int, Norm]]) -> Norms:
        of_each: list[list[Norm]] = [[] for _ in range(count)]
        for i, norm in some:
            of_each[i].append(norm)
        return in_one([joint_norms.join(norms, call.norm_type) for norms in of_each])

    own: list[tuple[int, Norm]] = []
    for ranks, some in by_mesh.items():
        sent = of_batches((parts[i].batch, norms[i]) for i in some if parts[i].layout.is_first)
        joint = _exchanged([parts[i] for i in some], sent, call)
        own += enumerate(joint) if meshes.is_first(ranks, among) else ()
    direct = []
    for i in sorted(set(range(len(parts))).difference(*by_mesh.values())):
        ranks, layout = _ranks_of(parts[i]), parts[i].layout
        is_within = meshes.are_within(ranks, among)
        direct += [parts[i]] if is_within else []
        if layout.is_first if is_within else meshes.is_first(ranks, among):
            own.append((parts[i].batch, norms[i]))
    total = of_batches(own)
    if groups:
        total = exchange(groups, total, call, meshes.device_of(groups[0]), _differing(direct))
    return list(total)


@not_compiled
def _each(parts: Sequence[Part], norms: Sequence[Norms], count: int, call: Call) -> list[Norms]:
    """The norm over all ranks of each tensor of each batch."""
    found: list[Iterable[Norm]] = list(norms)
    for some in _by_mesh(parts, frozenset([dist.get_rank()])).values():
        own = [norms[i] if parts[i].layout.is_first else [ABSENT] * len(parts[i].places) for i in some]
        joint = iter(_exchanged([parts[i] for i in some], concatenate(own), call))
        for i in some:
            found[i] = list(islice(joint, len(parts[i].places)))
    in_order: list[dict[int, Norm]] = [{} for _ in range(count)]
    for part, of_part in zip(parts, found, strict=True):
        placed = zip(part.places, of_part, strict=True)
        in_order[part.batch].update({place: norm for place, norm in placed if place is not None})
    return [in_one([of_batch[i] for i in range(len(of_batch))]) for of_batch in in_order]


def _by_mesh(parts: Sequence[Part], among: Ranks) -> dict[Ranks, list[int]]:
    """The numbers of the parts that are exchanged over meshes, by the ranks of these.

    Replicas are exchanged if anything is split over the same ranks, or is pending.  What lies within the
    ranks that exchange everything afterwards waits for that.
    """
    ranks_of = [_ranks_of(part) for part in parts]
    split = [part.layout.dims or part.layout.is_pending for part in parts]
    involved = {ranks for ranks, is_split in zip(ranks_of, split, strict=True) if is_split}
    found: dict[Ranks, list[int]] = {}
    for i, ranks in enumerate(ranks_of):
        if ranks in involved and not meshes.are_within(ranks, among):
            found.setdefault(ranks, []).append(i)
    return found


def _ranks_of(part: Part) -> Ranks:
    """The ranks that hold a part, or other parts of the same tensors; none if only this one does."""
    layout = part.layout
    is_alone = not layout.dims and layout.replicas == 1
    return frozenset() if is_alone else meshes.ranks_of(layout.mesh)


def _exchanged(parts: Sequence[Part], norms: Norms, call: Call) -> Norms:
    """The joint norms of parts on meshes of the same ranks."""
    mesh = parts[0].layout.mesh
    groups = meshes.groups_over(mesh)
    device = meshes.device_of(groups[0], mesh.device_type)
    return exchange(groups, norms, call, device, _differing(parts))


def _differing(parts: Sequence[Part]) -> int:
    """A number whose sum over all ranks is 0 if replicas have gradients of the same parameters.

    A rank's mark of what it lacks is multiplied by -1, but by the number of the others on the first replica.
    """
    total = 0
    for i, part in enumerate(parts):
        layout = part.layout
        if layout.replicas > 1 and None in part.places:
            lacking = [place is None for place in part.places]
            mark = 1 + crc32(repr((i, layout.part, lacking)).encode())
            total += mark * (layout.replicas - 1 if layout.is_first else -1)
    return total
