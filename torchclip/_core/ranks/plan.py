"""Which ranks exchange what in a call, and in which order.

Ranks that share a mesh over which a tensor is split exchange one number for everything on that mesh, and then
those that ``group`` connects exchange theirs.  What lies on a mesh within the ranks of ``group`` goes along
with that exchange.  Replicas count once: of the ranks with replicas, the first sends its norm, the others
``ABSENT``.

All ranks of a mesh have the same parameters on it, so that all of them come to the same plan, and follow it
to its end also if one of the exchanges fails.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar, cast
from zlib import crc32

import torch
import torch.distributed as dist

from torchclip._core import joint_norms
from torchclip._core.batch import Norm, Norms
from torchclip._core.ranks import meshes
from torchclip._core.ranks.exchange import Call, connected, exchange
from torchclip._core.ranks.meshes import Layout, Ranks
from torchclip._core.scalars import ABSENT, concatenate, in_one

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


class Part(NamedTuple):
    """Those tensors of a batch that have the same layout.

    Attributes:
        batch: the number of the batch in the call.
        layout: the layout.
        places: their positions in the batch; None in place of a tensor that is not on this rank.
    """

    batch: int
    layout: Layout
    places: Sequence[int | None]


@not_compiled
def totals(
    parts: Sequence[Part], norms: Sequence[Norm], count: int, groups: Sequence[dist.ProcessGroup], call: Call
) -> list[Norm]:
    """The norm of each batch over all ranks that share its meshes, or that a group connects.

    Args:
        parts: what this rank holds of the batches.
        norms: the norm of each of them.
        count: the number of batches.
        groups: process groups whose other ranks have other plain tensors, and DTensors on other meshes.
        call: the call; it has the facts of all those ranks afterwards.

    Returns:
        The norms, with the same bits on each of those ranks; ``ABSENT`` if none has any element.
    """
    # A group of all ranks connects what others connect, too.
    groups = [group for group in groups if group.size() == dist.get_world_size()][:1] or groups
    among = connected(groups, call) if groups else frozenset([dist.get_rank()])
    by_mesh, direct, rest = _parted(parts, among)

    def of_batches(some: Iterable[tuple[int, Norm]]) -> Norms:
        of_each: list[list[Norm]] = [[] for _ in range(count)]
        for i, norm in some:
            of_each[i].append(norm)
        return in_one([joint_norms.join(norms, call.order) for norms in of_each])

    own = [(parts[i].batch, norms[i]) for i in direct if parts[i].layout.is_first]
    own += [(parts[i].batch, norms[i]) for i in rest if meshes.is_first(_ranks_of(parts[i]), among)]
    for ranks, some in by_mesh.items():
        sent = of_batches((parts[i].batch, norms[i]) for i in some if parts[i].layout.is_first)
        joint = _exchanged([parts[i] for i in some], sent, call)
        if meshes.is_first(ranks, among):
            own += enumerate(joint)
    total = of_batches(own)
    if groups:
        marks = _differing([parts[i] for i in direct])
        total = exchange(groups, total, call, meshes.device_of(groups[0]), marks)
    return list(total)


@not_compiled
def each(parts: Sequence[Part], norms: Sequence[Norms], call: Call) -> list[Norms]:
    """The norm over all ranks of each tensor of the parts, in the order of their places."""
    found = list(norms)
    by_mesh, _, _ = _parted(parts, frozenset([dist.get_rank()]))
    for some in by_mesh.values():
        lengths = [len(parts[i].places) for i in some]
        counted = [parts[i].layout.is_first for i in some]
        sent = concatenate(
            [norms[i] if first else [ABSENT] * n for i, first, n in zip(some, counted, lengths, strict=True)]
        )
        joint = _exchanged([parts[i] for i in some], sent, call)
        for i, length, stop in zip(some, lengths, accumulate(lengths), strict=True):
            found[i] = joint[stop - length : stop]
    return found


def _parted(parts: Sequence[Part], among: Ranks) -> tuple[dict[Ranks, list[int]], list[int], list[int]]:
    """How the norms of parts get to all ranks among some.

    Returns:
        The numbers of the parts that are exchanged over meshes first, in the order of the parts; of those on
        a mesh within these ranks; and of the others, which are not split.  Replicas are exchanged if anything
        is split over the same ranks, or is pending.
    """
    ranks_of = [_ranks_of(part) for part in parts]
    direct = [i for i, ranks in enumerate(ranks_of) if meshes.are_within(ranks, among)]
    others = [i for i in range(len(parts)) if i not in direct]
    by_mesh: dict[Ranks, list[int]] = {
        ranks_of[i]: [] for i in others if parts[i].layout.dims or parts[i].layout.is_pending
    }
    for i in others:
        if ranks_of[i] in by_mesh:
            by_mesh[ranks_of[i]].append(i)
    return by_mesh, direct, [i for i in others if ranks_of[i] not in by_mesh]


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
