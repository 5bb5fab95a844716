"""Norms across ranks.

Ranks exchange norms, not sums of powers: they cannot overflow, every rank combines the same numbers in the
same order, and so all get the same result to the last bit.  The facts that decisions hang on travel with
them.  All ranks of a mesh must make the same calls with the same parameters; it does not matter whether these
have a gradient on every rank.

Groups of ranks are opaque to torch.compile, so a compiled function leaves its graph here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from torchclip._core import memory
from torchclip._core.batch import Norm
from torchclip._core.mesh import Layout
from torchclip._core.scalars import join, join_rows, on_device

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["across_meshes", "total"]


@_disable_dynamo
def total(
    norms: Mapping[Layout | None, Norm], facts: int, groups: Sequence[dist.ProcessGroup], p: float
) -> tuple[Norm, int]:
    """The joint norm of what this rank and those that share its meshes and groups hold.

    Args:
        norms: for each layout, and for None, the norm of what this rank holds of the tensors that lie like
            this, or ``ABSENT``; on an accelerator in float64.
        facts: the facts of what this rank holds.
        groups: process groups whose other ranks hold other plain tensors, and DTensors on other meshes.
        p: the order of the norms.

    Returns:
        The norm, the same on every rank that holds parts of the same tensors, ``ABSENT`` if none has any
        element; and the facts of all those ranks (on an accelerator, where they could not be read without
        waiting, of this one).
    """
    plain = [norm for layout, norm in norms.items() if layout is None]
    sharded = {layout: norm for layout, norm in norms.items() if layout is not None}
    if any(_has_all_ranks(group) for group in groups):
        return _across_world([*plain, *_first_copies(sharded)], facts, p)
    joint, facts = _joint_norms(sharded, facts, p)
    counted = [n for mesh, n in joint if all(_comes_first(mesh, group) for group in groups)]
    norm = join([*plain, *counted], p)
    for group in groups:
        norm, facts = _across_group(norm, facts, group, p)
    return norm, facts


def _joint_norms(
    norms: Mapping[Layout, Norm], facts: int, p: float
) -> tuple[list[tuple[DeviceMesh, Norm]], int]:
    """Norms of whole tensors: each with a mesh all of whose ranks get it."""
    of_all = {layout: norm for layout, norm in norms.items() if _has_all_ranks(layout.mesh)}
    split = next((layout.mesh for layout in of_all if layout.dims), None)
    joint: list[tuple[DeviceMesh, Norm]] = []
    if split is not None:
        # Every rank is here: one exchange among all does for these meshes, however many dimensions they have.
        norm, facts = _across_world(_first_copies(of_all), facts, p)
        joint = [(split, norm)]
        norms = {layout: norm for layout, norm in norms.items() if layout not in of_all}
    vectors = {layout: on_device([norm], layout.mesh.device_type) for layout, norm in norms.items()}
    of_meshes, facts = across_meshes(vectors, facts, p)
    return joint + [(layout.mesh, _number(norm[0])) for layout, norm in of_meshes.items()], facts


@_disable_dynamo
def across_meshes(vectors: Mapping[Layout, Tensor], facts: int, p: float) -> tuple[dict[Layout, Tensor], int]:
    """Join this rank's norms with those of the ranks that hold the other parts, element by element.

    Args:
        vectors: for each layout, norms of parts that lie like this, or ``ABSENT``: float64, of one
            dimension.
        facts: the facts of what this rank holds.
        p: the order of the norms.

    Returns:
        The joint norms, the same on every rank that holds a part; and the facts as ``total`` returns them.
    """
    joint = dict(vectors)
    for group, layouts in _rounds(list(vectors)):
        sent = torch.cat([joint[layout] for layout in layouts])
        rows, facts = _exchange(sent.to(layouts[0].mesh.device_type), facts, group)
        parts = torch.split(join_rows(rows.T, p), [len(joint[layout]) for layout in layouts])
        joint.update((layout, part.to(sent.device)) for layout, part in zip(layouts, parts, strict=True))
    return joint, facts


def _rounds(layouts: Sequence[Layout]) -> list[tuple[dist.ProcessGroup, list[Layout]]]:
    """Which groups of ranks exchange something, in order, and the layouts that it concerns.

    Each set of ranks once.  A norm is joined along the dimensions of its mesh one by one, in the same order
    on every rank of the mesh, whatever other meshes a rank has besides.
    """
    found: dict[frozenset[int], tuple[dist.ProcessGroup, list[Layout]]] = {}
    latest: dict[frozenset[int], int] = {}
    for layout in layouts:
        for dim in layout.dims:
            group = layout.mesh.get_group(dim)
            ranks = frozenset(dist.get_process_group_ranks(group))
            found.setdefault(ranks, (group, []))[1].append(layout)
            latest[ranks] = max(dim, latest.get(ranks, 0))
    return [found[ranks] for ranks in sorted(found, key=latest.__getitem__)]


def _across_world(norms: Sequence[Norm], facts: int, p: float) -> tuple[Norm, int]:
    """Join norms, any number on each rank, with those of all other ranks."""
    return _across_group(join(norms, p), facts, cast("dist.ProcessGroup", dist.group.WORLD), p)


def _across_group(norm: Norm, facts: int, group: dist.ProcessGroup, p: float) -> tuple[Norm, int]:
    """Join a norm with those of the other ranks of a group."""
    # The tensors of one rank may lie on the CPU, another's on an accelerator; the group decides.
    device = torch.device(dist.distributed_c10d._get_object_coll_device(group))
    rows, facts = _exchange(on_device([norm], device), facts, group)
    of_ranks = rows.view(-1)
    return join(of_ranks.tolist() if memory.on_host([of_ranks]) else of_ranks, p), facts


def _exchange(norms: Tensor, facts: int, group: dist.ProcessGroup) -> tuple[Tensor, int]:
    """Every rank's norms, as the rows of a matrix, and the facts of all ranks."""
    sent = torch.cat([norms, norms.new_full((1,), facts)])
    rows = sent.new_empty(dist.get_world_size(group), len(sent))
    dist.all_gather(list(rows.unbind()), sent, group=group)
    if memory.on_host([rows]):
        facts = reduce(or_, map(int, rows[:, -1].tolist()))
    return rows[:, :-1], facts


def _number(norm: Tensor) -> Norm:
    return norm.item() if memory.on_host([norm]) else norm


def _has_all_ranks(ranks: DeviceMesh | dist.ProcessGroup) -> bool:
    return ranks.size() == dist.get_world_size()


def _first_copies(norms: Mapping[Layout, Norm]) -> list[Norm]:
    """The norms of those parts that of all ranks with copies of them this one counts: the first."""
    return [
        norm
        for layout, norm in norms.items()
        if (here := layout.mesh.get_coordinate()) is not None
        and all(at == 0 for dim, at in enumerate(here) if dim not in layout.dims)
    ]


def _comes_first(mesh: DeviceMesh, group: dist.ProcessGroup) -> bool:
    """Whether of all ranks of a group that are in a mesh this is the first."""
    ranks = dist.get_process_group_ranks(group)
    return dist.get_rank() == min(set(ranks).intersection(mesh.mesh.flatten().tolist()), default=None)
