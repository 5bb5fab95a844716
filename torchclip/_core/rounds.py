"""Which ranks exchange what in a call, and in which order.

Ranks that share a mesh over which a tensor is split exchange one number for everything on that mesh, and so
do the ranks that ``group`` connects.  Copies count once: of the ranks with copies, the first sends its norm
and the others send ``ABSENT``.  The first may lack a gradient that others have, so all of them also send a
mark of the gradients that they have.  If the marks differ, the norms of all ranks are compared one by one.

All ranks of a mesh have the same parameters on it, so that all of them come to the same plan, and follow it
to its end also if one of the exchanges fails.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar, cast
from weakref import WeakKeyDictionary
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from torchclip._core import arguments, joint_norms, mesh
from torchclip._core.batch import Norm, Norms
from torchclip._core.collectives import DIFFERS, Call, Kind, exchange, gather_rows
from torchclip._core.mesh import Layout, Ranks
from torchclip._core.scalars import ABSENT, concatenate, in_one, on_device

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_OfBatch: TypeAlias = tuple[int, Norm]
"""The number of a batch and a norm of some of its tensors."""
# By the first of several groups: the ranks that it connects together with the others.
_ranks_connected: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[dist.ProcessGroup, ...], Ranks]] = (
    WeakKeyDictionary()
)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def not_compiled(function: _Function) -> _Function:
    """``torch.compiler.disable``, but the compiler is imported in the first call only."""
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return cast("_Function", call)


class Held(NamedTuple):
    """What this rank holds of those tensors of a batch that have the same layout.

    Attributes:
        batch: the number of the batch in the call.
        layout: the layout.
        places: the positions in the batch; None in place of a tensor that is not on this rank.
        norm: gives the norm of all of them.
        norms: gives the norm of each, ``ABSENT`` for those that are not on this rank.
    """

    batch: int
    layout: Layout
    places: Sequence[int | None]
    norm: Callable[[], Norm]
    norms: Callable[[], Norms]


def absent(batch: int, layout: Layout, places: Sequence[int | None]) -> Held:
    """The same for a rank that has nothing to tell."""
    return Held(batch, layout, places, lambda: ABSENT, lambda: [ABSENT] * len(places))


class _Item:
    """What some ranks exchange: a number for each batch, or for each tensor, on their meshes."""

    def __init__(self, ranks: Ranks, groups: Sequence[dist.ProcessGroup], device: str) -> None:
        self.ranks, self.groups, self.device = ranks, groups, device
        self.held: list[Held] = []

    def mark(self) -> int:
        """A number that shows which parameters with copies have gradients; 0 if all have."""
        places = [some.places for some in self.held if some.layout.copies]
        if not any(None in some for some in places):
            return 0
        return 1 + crc32(bytes(place is None for some in places for place in some))

    def counted(self) -> list[_OfBatch]:
        """The norms that this rank has to count."""
        return [(some.batch, some.norm()) for some in self.held if some.layout.is_first]

    def norms(self) -> Norms:
        """The norm of each tensor, ``ABSENT`` where it is not for this rank to count it."""
        counted = [some if some.layout.is_first else absent(*some[:3]) for some in self.held]
        return concatenate([some.norms() for some in counted])


@not_compiled
def totals(held: Sequence[Held], count: int, groups: Sequence[dist.ProcessGroup], call: Call) -> list[Norm]:
    """The norm of each batch over all ranks that share its meshes, or that a group connects.

    Args:
        held: what this rank holds of the batches.
        count: the number of batches.
        groups: process groups whose other ranks have other plain tensors, and DTensors on other meshes.
        call: the call; it has the facts of all those ranks afterwards.

    Returns:
        The norms, with the same bits on each of those ranks; ``ABSENT`` if none has any element.
    """
    p = call.order
    connected = _connected(groups, call) if groups else None
    items, rest = _items(held, every=connected is not None)
    own = [(some.batch, some.norm()) for some in rest]
    if connected is None:
        return list(_by_batch(own + _joint(items, None, count, call), count, p))
    direct = [item for item in items if _joins(item, connected)]
    own += _joint([item for item in items if item not in direct], connected, count, call)
    connected.held = [some for item in direct for some in item.held]
    joint, differing = _run({connected: _by_batch(own + connected.counted(), count, p)}, call)
    if differing:
        connected.held = []
        own += _joint(direct, connected, count, call)
        joint, _ = _run({connected: _by_batch(own, count, p)}, call)
    smaller = all(item.ranks != connected.ranks for item in items)
    if items and smaller and not any(some.layout is mesh.PLAIN for some in rest):
        _warn_of_copies(call)
    return list(joint[connected])


@not_compiled
def each(held: Sequence[Held], call: Call) -> list[Norms]:
    """The norm over all ranks of each tensor that this rank holds, in the order of its places."""
    items, rest = _items(held, every=False)
    joint, differing = _run({item: item.norms() for item in items}, call)
    joint.update({item: concatenate(_compared(item, call)) for item in differing})
    found = {(some.batch, some.layout): some.norms() for some in rest}
    for item in items:
        of_held = _split(joint[item], [len(some.places) for some in item.held])
        for some, norms in zip(item.held, of_held, strict=True):
            found[some.batch, some.layout] = norms
    return [found[some.batch, some.layout] for some in held]


@not_compiled
def lines(vectors: Mapping[Layout, Tensor], call: Call) -> dict[Layout, Tensor]:
    """Join norms, element by element, along the dimensions of their layouts and no others."""
    items: dict[tuple[DeviceMesh, tuple[int, ...]], _Item] = {}
    along: dict[_Item, list[Layout]] = {}
    for layout in vectors:
        groups = [layout.mesh.get_group(dim) for dim in layout.dims]
        # All ranks of a mesh agree on these, but not on whether two meshes have the same lines.
        item = items.setdefault((layout.mesh, layout.dims), _Item(None, groups, layout.mesh.device_type))
        along.setdefault(item, []).append(layout)
    sent = {item: concatenate([vectors[layout] for layout in layouts]) for item, layouts in along.items()}
    joint, _ = _run(sent, call)
    found: dict[Layout, Tensor] = {}
    for item, layouts in along.items():
        parts = _split(joint[item], [len(vectors[layout]) for layout in layouts])
        found.update(
            {at: on_device(part, vectors[at].device) for at, part in zip(layouts, parts, strict=True)}
        )
    return found


# What is exchanged


def _items(held: Sequence[Held], every: bool) -> tuple[list[_Item], list[Held]]:
    """What is exchanged over meshes, in the order of the tensors, and what is not.

    Copies are not exchanged if nothing is split over the same ranks, or is pending; with ``every`` they are.
    """
    items: dict[Ranks, _Item] = {}
    with_ranks: list[tuple[Ranks, Held]] = []
    for some in held:
        layout = some.layout
        is_alone = not (layout.dims or layout.copies)
        ranks = frozenset[int]() if is_alone else mesh.ranks_of(layout.mesh)
        with_ranks.append((ranks, some))
        if ranks not in items and (layout.dims or ((every or layout.is_pending) and layout.copies)):
            groups = mesh.groups_over(layout.mesh)
            items[ranks] = _Item(ranks, groups, mesh.device_of(groups[0], layout.mesh.device_type))
    rest: list[Held] = []
    for ranks, some in with_ranks:
        (items[ranks].held if ranks in items else rest).append(some)
    return list(items.values()), rest


def _joint(items: Sequence[_Item], connected: _Item | None, count: int, call: Call) -> list[_OfBatch]:
    """The joint norms of items that this rank has to count."""
    p = call.order
    joint, differing = _run({item: _by_batch(item.counted(), count, p) for item in items}, call)
    for item in differing:
        compared = zip(item.held, _compared(item, call), strict=True)
        joint[item] = _by_batch([(some.batch, norm) for some, norms in compared for norm in norms], count, p)
    counted = [item for item in items if connected is None or mesh.is_first(item.ranks, connected.ranks)]
    return [(i, joint[item][i]) for item in counted for i in range(count)]


def _by_batch(norms: Sequence[_OfBatch], count: int, p: float) -> Norms:
    """The joint norm of each batch."""
    of_batches: list[list[Norm]] = [[] for _ in range(count)]
    for i, norm in norms:
        of_batches[i].append(norm)
    return in_one([joint_norms.join(some, p) for some in of_batches])


def _joins(item: _Item, connected: _Item) -> bool:
    """Whether the tensors on an item's meshes can be exchanged together with a group's.

    Copies can, but only if all of the group's ranks compare their marks.
    """
    if item.ranks == connected.ranks:
        return True
    is_within = connected.ranks is None or (item.ranks is not None and item.ranks <= connected.ranks)
    return is_within and not any(some.layout.copies for some in item.held)


def _connected(groups: Sequence[dist.ProcessGroup], call: Call) -> _Item:
    """The exchange of all ranks that some groups connect."""
    of_all = [group for group in groups if group.size() == dist.get_world_size()]
    groups = of_all[:1] or groups
    device = mesh.device_of(groups[0])
    if len(groups) == 1:
        return _Item(mesh.ranks_of(groups[0]), groups, device)
    known, others = _ranks_connected.setdefault(groups[0], {}), tuple(groups[1:])
    if others not in known:
        connect = Call(Kind.CONNECT, 0.0)
        rows = _gathered(groups, np.array([[float(dist.get_rank())]]), connect)
        if connect.error is not None:
            call.fail(connect.error)
            return _Item(frozenset(), groups, device)
        found = frozenset(rows.astype(int).ravel().tolist())
        if len(found) < len(rows):
            raise ValueError(
                "the process groups in `group` must cross each other, so that any two ranks are connected in "
                f"only one way; rank {dist.get_rank()} is connected to some ranks several times"
            )
        known[others] = None if len(found) == dist.get_world_size() else found
    return _Item(known[others], groups, device)


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


# Exchanges


def _run(sent: Mapping[_Item, Norms], call: Call) -> tuple[dict[_Item, Norms], list[_Item]]:
    """The joint norms of items, and the items whose ranks lack different gradients."""
    joint = dict(sent)
    marks = {item: item.mark() for item in sent}
    for group, together in _rounds(list(sent)):
        here = concatenate([joint[item] for item in together])
        norms, learnt = exchange(group, here, [marks[item] for item in together], call, together[0].device)
        marks.update(zip(together, learnt, strict=True))
        joint.update(zip(together, _split(norms, [len(joint[item]) for item in together]), strict=True))
    return joint, [item for item, mark in marks.items() if mark == DIFFERS]


def _rounds(items: Sequence[_Item]) -> list[tuple[dist.ProcessGroup, list[_Item]]]:
    """The exchanges, in the same order on all ranks that take part in any two of them.

    What takes one exchange goes along with that of another item among the same ranks.
    """
    rounds: list[tuple[dist.ProcessGroup, list[_Item]]] = []
    latest: dict[Ranks, list[_Item]] = {}
    for item in sorted(items, key=lambda item: len(item.groups) == 1):
        for group in item.groups:
            ranks = mesh.ranks_of(group)
            if len(item.groups) > 1 or ranks not in latest:
                latest[ranks] = []
                rounds.append((group, latest[ranks]))
            latest[ranks].append(item)
    return rounds


def _compared(item: _Item, call: Call) -> list[list[float]]:
    """The norm of each tensor of an item whose copies are not everywhere, for each of what lies alike."""
    own = [list(map(float, some.norms())) for some in item.held]
    compare = Call(Kind.COMPARE, call.order, call.facts, call.refused)
    row = np.array([[float(dist.get_rank()), *(norm for norms in own for norm in norms)]])
    rows = _gathered(item.groups, row, compare)
    if compare.error is not None:
        call.fail(compare.error)
        return own
    of_rank = {int(row[0]): _split(row[1:], list(map(len, own))) for row in rows}
    found = []
    with np.errstate(all="ignore"):
        for at, some in enumerate(item.held):
            layout = some.layout
            of_mesh = np.array([of_rank[rank][at] for rank in layout.mesh.mesh.flatten().tolist()])
            # If copies differ, the largest counts.
            by_rank = joint_norms.keys(of_mesh.reshape(*layout.mesh.shape, -1), 1.0)
            whole = joint_norms.leading(by_rank.max(axis=layout.copies), 1.0).reshape(-1, of_mesh.shape[1])
            found.append(joint_norms.join_columns(whole, call.order).tolist())
    return found


def _split(numbers: Any, lengths: Sequence[int]) -> list[Any]:
    """Consecutive parts of a list, an array or a tensor."""
    return [numbers[stop - length : stop] for length, stop in zip(lengths, accumulate(lengths), strict=True)]


def _gathered(groups: Sequence[dist.ProcessGroup], row: np.ndarray, call: Call) -> np.ndarray:
    """The rows of all ranks that some groups connect; of some of them if the call fails."""
    rows = row
    for group in groups:  # all of them in any case, as other ranks do
        found = gather_rows(group, rows.ravel(), call, mesh.device_of(group))
        rows = rows if found is None else found.reshape(-1, row.shape[1])
    return rows
