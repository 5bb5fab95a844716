"""What a sharded tensor is made of on this rank, and norms across ranks.

A DTensor lies on a mesh of ranks.  Along some dimensions of the mesh it is split, along the others each rank
has a copy.  Its norm is the joint norm of the parts along the former: a copy is counted once.

Ranks exchange norms, not sums of powers: they cannot overflow, every rank combines the same numbers in the
same order, and so all get the same result to the last bit.  All ranks of a mesh must make the same calls with
the same parameters; it does not matter whether these have a gradient on every rank.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from torchclip._core import arguments, eager
from torchclip._core.combine import join, join_tensors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement, Shard

__all__ = [
    "Layout",
    "across_meshes",
    "as_groups",
    "dtensor_types",
    "has_ranks",
    "is_dtensor",
    "is_partial",
    "layout_of",
    "locals_of",
    "split_alike",
    "total",
    "without_partial",
]


class Layout(NamedTuple):
    """A mesh, and the dimensions of it along which a tensor is split over several ranks, in order."""

    mesh: DeviceMesh
    dims: tuple[int, ...]


def has_ranks() -> bool:
    """Whether there are other processes at all."""
    return dist.is_available() and dist.is_initialized()


def dtensor_types() -> tuple[type, ...]:
    """DTensor, or nothing while there can be none: its module, slow to import, has not been imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else (module.DTensor,)


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor."""
    return isinstance(tensor, dtensor_types())


def layout_of(tensor: Tensor, *, except_dim: int | None = None) -> Layout | None:
    """How a tensor lies on its mesh; None for a plain one.

    With ``except_dim``, only as far as it is split along other dimensions of its own than this one.
    """
    if not is_dtensor(tensor):
        return None
    mesh = tensor.device_mesh
    if mesh.get_coordinate() is None:  # a rank outside of the mesh holds nothing, and takes no part
        return Layout(mesh, ())
    return Layout(
        mesh,
        tuple(
            i
            for i, placement in enumerate(tensor.placements)
            if mesh.size(i) > 1
            and not (placement.is_replicate() or placement.is_partial())
            # Not only Shard, also the other kinds of it, which have a dim as well.
            and cast("Shard", placement).dim != except_dim
        ),
    )


def split_alike(a: Tensor, b: Tensor) -> bool:
    """Whether this rank holds the same elements of two tensors of one shape."""
    if not (is_dtensor(a) and is_dtensor(b)):
        return is_dtensor(a) == is_dtensor(b)
    return a.device_mesh == b.device_mesh and _splits(a) == _splits(b)


def _splits(tensor: DTensor) -> list[Placement | None]:
    return [None if p.is_replicate() or p.is_partial() else p for p in tensor.placements]


def locals_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor, in the tensor's own memory."""
    dtensor = dtensor_types()
    with torch.no_grad():
        return [cast("DTensor", t).to_local() if isinstance(t, dtensor) else t for t in tensors]


def is_partial(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor that is pending a reduction."""
    return is_dtensor(tensor) and any(placement.is_partial() for placement in tensor.placements)


def without_partial(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with those that are pending a reduction reduced, into copies.

    All that are pending on the same dimension of a mesh are reduced in one collective.
    """
    pending: dict[tuple[Any, ...], list[int]] = {}
    for i, tensor in enumerate(tensors):
        if is_dtensor(tensor):
            for dim, placement in enumerate(tensor.placements):
                if placement.is_partial():
                    key = (tensor.device_mesh, dim, placement, tensor.dtype)
                    pending.setdefault(key, []).append(i)
    if not pending:
        return list(tensors)
    from torch.distributed._functional_collectives import all_reduce
    from torch.distributed.tensor import DTensor, Replicate

    result = list(tensors)
    for (mesh, dim, placement, _), places in pending.items():
        chosen = [cast("DTensor", result[i]) for i in places]
        together = torch.cat([t.to_local().reshape(-1) for t in chosen])
        reduced = all_reduce(together, placement.reduce_op, (mesh, dim))
        for i, t, part in zip(
            places, chosen, reduced.split([t.to_local().numel() for t in chosen]), strict=True
        ):
            placements = [Replicate() if d == dim else each for d, each in enumerate(t.placements)]
            result[i] = DTensor.from_local(
                part.view(t.to_local().shape),
                mesh,
                placements,
                run_check=False,
                shape=t.shape,
                stride=t.stride(),
            )
    return result


def as_groups(group: Any) -> list[dist.ProcessGroup]:
    """The argument ``group`` as a list: None, a process group, or several."""
    if group is None:
        return []
    groups = list(group) if isinstance(group, (list, tuple)) else [group]
    for each in groups:
        if not isinstance(each, dist.ProcessGroup):
            raise TypeError(
                f"`group` must be a process group or a list of them, got {arguments.shown(each)}; a rank "
                "outside of a group must not pass it"
            )
    return groups


# Norms.  Groups of ranks are opaque to torch.compile, so a compiled function leaves its graph here.


@_disable_dynamo
def total(
    norms: Mapping[Layout | None, float | Tensor], groups: Sequence[dist.ProcessGroup], p: float
) -> float | Tensor:
    """The joint norm of what this rank and those that share its meshes and groups hold.

    Args:
        norms: for each layout, and for None, the norm of what this rank holds of the tensors that lie like
            this, or ``ABSENT``; on an accelerator in float64.
        groups: process groups whose other ranks hold other plain tensors, and DTensors on other meshes.
        p: the order of the norms.

    Returns:
        The norm, the same on every rank that holds parts of the same tensors; 0.0 if none has any element.
    """
    plain = [norm for layout, norm in norms.items() if layout is None]
    sharded = {layout: norm for layout, norm in norms.items() if layout is not None}
    if any(_has_all_ranks(group) for group in groups):
        result = _across_world([*plain, *_first_copies(sharded)], p)
    else:
        joint = _joint_norms(sharded, p)
        counted = [n for mesh, n in joint if all(_comes_first(mesh, group) for group in groups)]
        result = join([*plain, *counted], p)
        for group in groups:
            result = _across_group(result, group, p)
    return max(result, 0.0) if isinstance(result, float) else result.clamp(min=0.0)


def _joint_norms(norms: Mapping[Layout, float | Tensor], p: float) -> list[tuple[DeviceMesh, float | Tensor]]:
    """Norms of whole tensors: each with a mesh all of whose ranks get it."""
    of_all = {layout: norm for layout, norm in norms.items() if _has_all_ranks(layout.mesh)}
    split = next((layout.mesh for layout in of_all if layout.dims), None)
    joint: list[tuple[DeviceMesh, float | Tensor]] = []
    if split is not None:
        # Every rank is here: one exchange among all does for these meshes, however many dimensions they have.
        joint = [(split, _across_world(_first_copies(of_all), p))]
        norms = {layout: norm for layout, norm in norms.items() if layout not in of_all}
    vectors = {
        layout: torch.as_tensor(norm, dtype=torch.float64, device=layout.mesh.device_type).view(1)
        for layout, norm in norms.items()
    }
    return joint + [(layout.mesh, _number(norm[0])) for layout, norm in across_meshes(vectors, p).items()]


@_disable_dynamo
def across_meshes(vectors: Mapping[Any, Tensor], p: float) -> dict[Any, Tensor]:
    """Join this rank's norms with those of the ranks that hold the other parts, element by element.

    Args:
        vectors: for each layout, norms of parts that lie like this, or ``ABSENT``: float64, of one
            dimension.
        p: the order of the norms.

    Returns:
        The joint norms, the same on every rank that holds a part; those without a layout as they are.
    """
    joint = dict(vectors)
    for group, layouts in _rounds([layout for layout in vectors if layout is not None]):
        sent = torch.cat([joint[layout] for layout in layouts])
        gathered = _gather(sent.to(layouts[0].mesh.device_type), group).to(sent.device)
        parts = torch.split(join_tensors(gathered.T, p), [len(joint[layout]) for layout in layouts])
        joint.update(zip(layouts, parts, strict=True))
    return joint


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


def _across_world(norms: Sequence[float | Tensor], p: float) -> float | Tensor:
    """Join norms, any number on each rank, with those of all other ranks."""
    return _across_group(join(norms, p), cast("dist.ProcessGroup", dist.group.WORLD), p)


def _across_group(norm: float | Tensor, group: dist.ProcessGroup, p: float) -> float | Tensor:
    """Join a norm with those of the other ranks of a group."""
    # The tensors of one rank may lie on the CPU, another's on an accelerator; the group decides.
    device = torch.device(dist.distributed_c10d._get_object_coll_device(group))
    of_ranks = _gather(torch.as_tensor(norm, dtype=torch.float64, device=device).view(1), group).view(-1)
    return join(of_ranks.tolist(), p) if eager.on_host([of_ranks]) else join_tensors(of_ranks, p)


def _gather(vector: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's vector, as the rows of a matrix."""
    rows = vector.new_empty(dist.get_world_size(group), len(vector))
    dist.all_gather(list(rows.unbind()), vector, group=group)
    return rows


def _number(norm: Tensor) -> float | Tensor:
    return norm.item() if eager.on_host([norm]) else norm


def _has_all_ranks(ranks: DeviceMesh | dist.ProcessGroup) -> bool:
    return ranks.size() == dist.get_world_size()


def _first_copies(norms: Mapping[Layout, float | Tensor]) -> list[float | Tensor]:
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
