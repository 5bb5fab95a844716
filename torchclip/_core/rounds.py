"""Which ranks exchange what in a call, and in which order.

Ranks that share a mesh over which a tensor is split exchange one number for everything on that mesh, and so
do the ranks that ``group`` connects.  Copies count once: of the ranks with copies, the first sends its norm
and the others send ``ABSENT``.  The first may lack a gradient that others have, so all of them also send a
mark of the gradients that they have.  If the marks differ, the norms of all ranks are compared one by one.

All ranks of a mesh have the same parameters on it, so all of them make the same plan.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from torchclip._core import arguments, integer_sums, mesh
from torchclip._core.batch import Norm, Norms
from torchclip._core.collectives import DIFFERS, SLOTS, Call, Kind, exchange, gather_rows
from torchclip._core.mesh import Layout, Ranks
from torchclip._core.scalars import ABSENT, concatenate, device_of, in_one, on_device

__all__ = ["Part", "Places", "each", "joined", "lines", "totals"]

Places = Mapping["Layout | None", Sequence["int | None"]]
"""The tensors of each layout (None for plain tensors); None in place of a tensor that is not on this rank."""


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _not_compiled(function: _Function) -> _Function:
    """``torch.compiler.disable``, but the compiler is imported in the first call only."""
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return cast("_Function", call)


class Part(NamedTuple):
    """This rank's part of tensors that have one joint norm.

    Attributes:
        places: their layouts.
        pending: the layouts of those that are pending a reduction, which involves all ranks of a mesh anyway.
        norm: the norm of the tensors with a given layout.
        norms: the norm of each tensor with a given layout, ``ABSENT`` for those that are not on this rank.
    """

    places: Places
    pending: Collection[Layout]
    norm: Callable[[Layout | None], Norm]
    norms: Callable[[Layout | None], Norms]


class _Held(NamedTuple):
    """The tensors of a part that have the same layout."""

    part: int
    layout: Layout


class _Item:
    """What some ranks exchange: a number for each part, or for each tensor, on their meshes."""

    def __init__(self, ranks: Ranks, groups: Sequence[dist.ProcessGroup], device: str) -> None:
        self.ranks, self.groups, self.device = ranks, groups, device
        self.held: list[_Held] = []

    def mark(self, parts: Sequence[Part]) -> int:
        """A number that shows which parameters with copies have gradients; 0 if all have."""
        places = [parts[part].places[layout] for part, layout in self.held if layout.copies]
        if not any(None in some for some in places):
            return 0
        return 1 + crc32(bytes(place is None for some in places for place in some))


@_not_compiled
def totals(parts: Sequence[Part], groups: Sequence[dist.ProcessGroup], call: Call) -> list[Norm]:
    """The norm of each part over all ranks that share its meshes, or that a group connects.

    Args:
        parts: this rank's parts.
        groups: process groups whose other ranks have other plain tensors, and DTensors on other meshes.
        call: the call; it has the facts of all those ranks afterwards.

    Returns:
        The norms, with the same bits on each of those ranks; ``ABSENT`` if none has any element.
    """
    return _totals(parts, groups, call, at_once=True)


@_not_compiled
def each(parts: Sequence[Part], call: Call) -> list[dict[Layout, Norms]]:
    """The norm of each tensor with a given layout over all ranks of its mesh, in the order of places."""
    items = _items(parts, every=False)
    sent = {item: concatenate([_counted(parts, held) for held in item.held]) for item in items}
    joint = _exchanged(parts, items, sent, call)
    found: list[dict[Layout, Norms]] = [{} for _ in parts]
    for item in items:
        norms, start = joint[item], 0
        for part, layout in item.held:
            stop = start + len(parts[part].places[layout])
            found[part][layout] = norms[start:stop]
            start = stop
    return found


@_not_compiled
def lines(vectors: Mapping[Layout, Tensor], call: Call) -> dict[Layout, Tensor]:
    """Join norms, element by element, along the dimensions of their layouts and no others."""
    joint = dict(vectors)
    for group, layouts in _lines(list(vectors)):
        sent = torch.cat([joint[layout] for layout in layouts])
        norms, _ = exchange(group, sent, (), call, layouts[0].mesh.device_type)
        parts = torch.split(on_device(norms, sent.device), [len(joint[layout]) for layout in layouts])
        joint.update(zip(layouts, parts, strict=True))
    return joint


def _lines(layouts: Sequence[Layout]) -> list[tuple[dist.ProcessGroup, list[Layout]]]:
    """Each set of ranks once.  The dimensions of a mesh have the same order on all of its ranks."""
    found: dict[Ranks, tuple[dist.ProcessGroup, list[Layout]]] = {}
    latest: dict[Ranks, int] = {}
    for layout in layouts:
        for dim in layout.dims:
            group = layout.mesh.get_group(dim)
            ranks = mesh.ranks_of_group(group)
            found.setdefault(ranks, (group, []))[1].append(layout)
            latest[ranks] = max(dim, latest.get(ranks, 0))
    return [found[ranks] for ranks in sorted(found, key=latest.__getitem__)]


def _totals(
    parts: Sequence[Part], groups: Sequence[dist.ProcessGroup], call: Call, at_once: bool
) -> list[Norm]:
    """``totals``; with ``at_once``, tensors on meshes within a group are exchanged with the group's."""
    p = call.order
    connected = _connected(groups, call) if groups else None
    items = _items(parts, every=connected is not None)
    direct = [item for item in items if at_once and connected is not None and _joins(item, connected)]
    before = [item for item in items if item not in direct]
    sent: dict[_Item, Norms] = {item: in_one(_of_parts(parts, item, p)) for item in before}
    joint = _exchanged(parts, before, sent, call)
    exchanged = {held for item in items for held in item.held}
    own = [
        [part.norm(layout) for layout in part.places if layout is None or (i, layout) not in exchanged]
        for i, part in enumerate(parts)
    ]
    for item in before:
        if connected is None or mesh.is_first(item.ranks, connected.ranks):
            for norms, norm in zip(own, joint[item], strict=True):
                norms.append(norm)
    if connected is None:
        return [joined(norms, p) for norms in own]
    for item in direct:
        connected.held += item.held
        for norms, norm in zip(own, _of_parts(parts, item, p), strict=True):
            norms.append(norm)
    sent = {connected: in_one([joined(norms, p) for norms in own])}
    joint, differing = _run(parts, [connected], sent, call)
    if differing:
        return _totals(parts, groups, call, at_once=False)
    smaller = all(item.ranks != connected.ranks for item in items)
    if items and smaller and not any(part.places.get(None) for part in parts):
        _warn_of_copies(call)
    return list(joint[connected])


def _warn_of_copies(call: Call) -> None:
    """Warn if every norm that the ranks of a group have counted occurs several times, to the last bit."""
    if call.error is not None or call.sent is None:
        return
    for column in call.sent.T.tolist():
        counts = Counter(norm for norm in column if norm > 0)
        if not counts or min(counts.values()) < 2 or math.inf in counts:
            return
    message = (
        "the ranks of `group` have the same norms on different meshes, to the last bit: these seem to be "
        "copies of the same gradients, of which each counts here; pass as `group` only the process group "
        "across which gradients differ, such as that of pipeline stages (`mesh.get_group('pp')`), or none"
    )
    warnings.warn(message, stacklevel=arguments.level_of_caller())


def _joins(item: _Item, connected: _Item) -> bool:
    """Whether the tensors on an item's meshes can be exchanged together with a group's.

    Copies can, but only if all of the group's ranks compare their marks.
    """
    if item.ranks == connected.ranks:
        return True
    return mesh.is_within(item.ranks, connected.ranks) and not any(h.layout.copies for h in item.held)


def _connected(groups: Sequence[dist.ProcessGroup], call: Call) -> _Item:
    """The exchange of all ranks that some groups connect."""
    of_all = [group for group in groups if group.size() == dist.get_world_size()]
    groups = of_all[:1] or groups
    device = mesh.device_of_group(groups[0])
    if len(groups) == 1:
        return _Item(mesh.ranks_of_group(groups[0]), groups, device)
    known = mesh.known_ranks(groups)
    if known is None:
        connect = Call(Kind.CONNECT, 0.0, call.facts, call.refused)
        found = np.array([[float(dist.get_rank())]])
        for group in groups:
            rows = gather_rows(group, found.ravel(), connect, mesh.device_of_group(group))
            if rows is None:
                call.fail(cast("str", connect.error))
                return _Item(frozenset(), groups, device)
            found = rows
        known = (mesh.remember_ranks(groups, found.astype(int).ravel().tolist()),)
    return _Item(known[0], groups, device)


def _items(parts: Sequence[Part], every: bool) -> list[_Item]:
    """What is exchanged over meshes, in the order of the tensors; with ``every`` also without splits."""
    items: dict[Ranks, _Item] = {}
    layouts = [
        _Held(i, layout) for i, part in enumerate(parts) for layout in part.places if layout is not None
    ]
    for part, layout in layouts:
        if layout.dims or ((every or layout in parts[part].pending) and layout.copies):
            ranks = mesh.ranks_of(layout.mesh)
            if ranks not in items:
                items[ranks] = _Item(ranks, mesh.groups_over(layout.mesh), mesh.device_of(layout.mesh))
    for held in layouts if items else ():
        if held.layout.dims or held.layout.copies:
            item = items.get(mesh.ranks_of(held.layout.mesh))
            if item is not None:
                item.held.append(held)
    return list(items.values())


def _of_parts(parts: Sequence[Part], item: _Item, p: float) -> list[Norm]:
    """For each part, the norm of what this rank counts for an item."""
    norms: list[list[Norm]] = [[] for _ in parts]
    for part, layout in item.held:
        if layout.is_first:
            norms[part].append(parts[part].norm(layout))
    return [joined(some, p) for some in norms]


def _counted(parts: Sequence[Part], held: _Held) -> Norms:
    """The norm of each tensor whose part on this rank counts."""
    if held.layout.is_first:
        return parts[held.part].norms(held.layout)
    return [ABSENT] * len(parts[held.part].places[held.layout])


def _exchanged(
    parts: Sequence[Part], items: Sequence[_Item], sent: dict[_Item, Norms], call: Call
) -> dict[_Item, Norms]:
    """The joint norms of items, including those whose ranks lack different gradients."""
    joint, differing = _run(parts, items, sent, call)
    for item in differing:
        norms = _compared(parts, item, call)
        if norms is None:
            continue
        if call.kind in (Kind.CLIP, Kind.MEASURE):
            of_parts: list[list[Norm]] = [[] for _ in parts]
            for (part, _), some in zip(item.held, norms, strict=True):
                of_parts[part] += some
            joint[item] = in_one([joined(some, call.order) for some in of_parts])
        else:
            joint[item] = [norm for some in norms for norm in some]
    return joint


def _run(
    parts: Sequence[Part], items: Sequence[_Item], sent: dict[_Item, Norms], call: Call
) -> tuple[dict[_Item, Norms], list[_Item]]:
    """The joint norms of items, and the items whose ranks lack different gradients."""
    joint = dict(sent)
    marks = {item: item.mark(parts) for item in items}
    for group, device, together in _rounds(items):
        for start in range(0, len(together), SLOTS):
            some = together[start : start + SLOTS]
            sent_here = concatenate([joint[item] for item in some])
            norms, differ = exchange(group, sent_here, [marks[item] for item in some], call, device)
            at = 0
            for item, differs in zip(some, differ, strict=True):
                joint[item] = norms[at : at + len(joint[item])]
                at += len(joint[item])
                if differs:
                    marks[item] = DIFFERS
    return joint, [item for item in items if marks[item] == DIFFERS and call.error is None]


def _rounds(items: Sequence[_Item]) -> list[tuple[dist.ProcessGroup, str, list[_Item]]]:
    """The exchanges, in the same order on all ranks that take part in any two of them.

    Items that take one exchange share it with other items among the same ranks.
    """
    along: dict[Ranks, _Item] = {}
    for item in items:
        if len(item.groups) > 1:
            along.update((mesh.ranks_of_group(group), item) for group in item.groups)
    rounds = []
    for item in items:
        if len(item.groups) == 1:
            if not along or item.ranks not in along:
                rounds.append((item.groups[0], item.device, [item]))
            continue
        for group in item.groups:
            ranks = mesh.ranks_of_group(group)
            others = [other for other in items if len(other.groups) == 1 and other.ranks == ranks]
            rounds.append((group, item.device, [item, *(others if along[ranks] is item else [])]))
    return rounds


def _compared(parts: Sequence[Part], item: _Item, call: Call) -> list[list[float]] | None:
    """The norm of each tensor of an item of which some ranks lack their copies; None if the call failed."""
    own = [list(map(float, parts[part].norms(layout))) for part, layout in item.held]
    compare = Call(Kind.COMPARE, call.order, call.facts)
    rows = np.array([[float(dist.get_rank()), *(norm for norms in own for norm in norms)]])
    for group in item.groups:
        gathered = gather_rows(group, rows.ravel(), compare, item.device)
        if gathered is None:
            call.fail(cast("str", compare.error))
            return None
        rows = gathered.reshape(-1, rows.shape[1])
    of_rank = {int(row[0]): row[1:] for row in rows}
    found, start = [], 0
    with np.errstate(all="ignore"):
        for (_, layout), norms in zip(item.held, own, strict=True):
            of_mesh = np.array([of_rank[rank] for rank in layout.mesh.mesh.flatten().tolist()])
            of_mesh = of_mesh[:, start : start + len(norms)].reshape(*layout.mesh.shape, len(norms))
            # If copies differ, the largest counts.
            largest = integer_sums.keys(of_mesh, 1.0).max(axis=layout.copies)
            whole = integer_sums.leading(largest, 1.0).reshape(-1, len(norms))
            found.append(integer_sums.join(whole, call.order).tolist())
            start += len(norms)
    return found


def joined(norms: Sequence[Norm], p: float) -> Norm:
    """The joint norm of norms that this rank knows, with the same bits as on all ranks."""
    present = [norm for norm in norms if isinstance(norm, Tensor) or not norm < 0]
    if len(present) < 2:
        return present[0] if present else ABSENT
    device = device_of(present)
    if device is not None:
        return cast("Tensor", integer_sums.join(on_device(present, device), p))
    with np.errstate(all="ignore"):
        return float(integer_sums.join(np.array(present), p))
