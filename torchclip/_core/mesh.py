"""How a DTensor lies on its mesh of ranks, and which part of it this rank holds.

Along some dimensions of the mesh a tensor is split; along the others each rank has a copy.  Its norm is the
joint norm of the parts along the former, with each copy counted once.
"""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeGuard, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from torchclip._core import arguments

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement, Shard

__all__ = [
    "Layout",
    "as_groups",
    "dtensor_types",
    "has_ranks",
    "is_dtensor",
    "is_partial",
    "layout_of",
    "locals_of",
    "split_alike",
    "without_partial",
]


Ranks: TypeAlias = "frozenset[int] | None"
"""A set of ranks; None for all ranks, of which there may be very many."""


class Layout(NamedTuple):
    """A mesh, and the dimensions of it along which a tensor is split over several ranks, in order."""

    mesh: DeviceMesh
    dims: tuple[int, ...]

    @property
    def copies(self) -> tuple[int, ...]:
        """The dimensions along which several ranks have copies; none on a rank outside the mesh."""
        if self.mesh.get_coordinate() is None:
            return ()
        return tuple(i for i in range(self.mesh.ndim) if self.mesh.size(i) > 1 and i not in self.dims)

    @property
    def is_first(self) -> bool:
        """Whether this is the first of the ranks with copies of the same parts."""
        here = self.mesh.get_coordinate()
        return here is not None and all(here[dim] == 0 for dim in self.copies)


# A number for each layout on a mesh: by the identities of the mesh and of the placements, which are kept so
# that no other objects get their ids, and by the placements' values.
_ways: dict[tuple[int, int], int] = {}
_equal_ways: dict[tuple[int, Any], int] = {}
_kept: list[Any] = []
_numbers = itertools.count()
_MOST_KEPT = 1 << 16
# Equal meshes have the same ranks.
_ranks_of_mesh: WeakKeyDictionary[DeviceMesh, frozenset[int]] = WeakKeyDictionary()
_ranks_of_group: WeakKeyDictionary[dist.ProcessGroup, frozenset[int]] = WeakKeyDictionary()
# By the first of several groups: the other groups, and the ranks that all of them connect.
_connected: WeakKeyDictionary[dist.ProcessGroup, list[tuple[list[Any], Ranks]]] = WeakKeyDictionary()


def ranks_of(mesh: DeviceMesh) -> Ranks:
    """The ranks of a mesh."""
    if mesh.size() == dist.get_world_size():
        return None
    ranks = _ranks_of_mesh.get(mesh)
    if ranks is None:
        ranks = _ranks_of_mesh[mesh] = frozenset(mesh.mesh.flatten().tolist())
    return ranks


def ranks_of_group(group: dist.ProcessGroup) -> Ranks:
    """The ranks of a process group."""
    if group.size() == dist.get_world_size():
        return None
    ranks = _ranks_of_group.get(group)
    if ranks is None:
        ranks = _ranks_of_group[group] = frozenset(dist.get_process_group_ranks(group))
    return ranks


def known_ranks(groups: Sequence[dist.ProcessGroup]) -> tuple[Ranks] | None:
    """The ranks that several groups connect, in a tuple, if that is known."""
    for others, ranks in _connected.get(groups[0], []):
        if len(others) == len(groups) - 1 and all(map(operator.is_, others, groups[1:])):
            return (ranks,)
    return None


def remember_ranks(groups: Sequence[dist.ProcessGroup], found: list[int]) -> Ranks:
    """Record the ranks that several groups connect; each rank must be found once."""
    if len(set(found)) < len(found):
        raise ValueError(
            "the process groups in `group` must cross each other, so that every two ranks that they connect "
            f"are connected in one way; of these, rank {dist.get_rank()} meets some ranks several times"
        )
    ranks = None if len(found) == dist.get_world_size() else frozenset(found)
    _connected.setdefault(groups[0], []).append((list(groups[1:]), ranks))
    return ranks


def is_within(ranks: Ranks, others: Ranks) -> bool:
    """Whether a set of ranks is part of another."""
    return others is None or (ranks is not None and ranks <= others)


def is_first(ranks: Ranks, among: Ranks) -> bool:
    """Whether this rank is the first of the ranks that two sets have in common."""
    here = dist.get_rank()
    if ranks is None or among is None:
        both = among if ranks is None else ranks
        return here == (0 if both is None else min(both))
    return here == min(ranks & among, default=None)


def groups_over(mesh: DeviceMesh) -> list[dist.ProcessGroup]:
    """Process groups that together connect all ranks of a mesh: one if torch has one, or one a dimension."""
    wide = [dim for dim in range(mesh.ndim) if mesh.size(dim) > 1]
    if len(wide) > 1:
        if mesh.size() == dist.get_world_size():
            return [cast("dist.ProcessGroup", dist.group.WORLD)]
        for flat in _flattened(mesh):
            if ranks_of(flat) == ranks_of(mesh):
                return [flat.get_group()]
    return [mesh.get_group(dim) for dim in wide]


def _flattened(mesh: DeviceMesh) -> list[DeviceMesh]:
    """One-dimensional meshes into which the user has flattened dimensions of the same mesh.

    Torch keeps them in a dictionary of the mesh that has all dimensions; it has public names for neither.
    """
    kind = type(mesh)
    meshes = [mesh, *(held for held in vars(mesh).values() if isinstance(held, kind))]
    kept = [held for each in meshes for held in vars(each).values() if isinstance(held, dict)]
    found = [flat for held in kept for flat in held.values()]
    return [flat for flat in found if isinstance(flat, kind) and flat.ndim == 1]


def device_of(mesh: DeviceMesh) -> str:
    """The type of the device that the collectives over a mesh work on."""
    devices = _devices_of_group(groups_over(mesh)[0])
    return mesh.device_type if mesh.device_type in devices else _first_choice(devices)


def device_of_group(group: dist.ProcessGroup) -> str:
    """The type of the device that the collectives of a group work on."""
    # One rank's tensors may be on the CPU and another's on an accelerator.
    return _first_choice(_devices_of_group(group))


def _devices_of_group(group: dist.ProcessGroup) -> list[str]:
    """The types of the devices that a group's collectives can work on, of such as "cpu:gloo,cuda:nccl"."""
    return [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]


def _first_choice(devices: Sequence[str]) -> str:
    return "cpu" if "cpu" in devices else devices[0]


def has_ranks() -> bool:
    """Whether there are other processes at all."""
    return dist.is_available() and dist.is_initialized()


def dtensor_types() -> tuple[type, ...]:
    """The class DTensor; nothing if there can be none, as its module, slow to import, was not imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else (module.DTensor,)


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor."""
    return isinstance(tensor, dtensor_types())


def any_dtensor(tensors: Iterable[Tensor]) -> bool:
    """Whether any of the tensors is a DTensor."""
    types = dtensor_types()
    return bool(types) and any(issubclass(kind, types) for kind in set(map(type, tensors)))


def ways_of(tensors: Sequence[Tensor]) -> list[int | None]:
    """A number for each tensor, equal for tensors with the same layout; None for plain tensors.

    It must be quick: comparing placements takes as long as all other work for a DTensor.
    """
    dtensor: Any = dtensor_types()
    return [_way_of(t.device_mesh, t.placements) if isinstance(t, dtensor) else None for t in tensors]


def _way_of(mesh: DeviceMesh, placements: Sequence[Placement]) -> int:
    key = id(mesh), id(placements)
    way = _ways.get(key)
    if way is None:
        if len(_kept) >= _MOST_KEPT:
            for known in (_ways, _equal_ways, _kept):
                known.clear()
        way = _ways[key] = _equal_ways.setdefault((id(mesh), placements), next(_numbers))
        _kept.append((mesh, placements))
    return way


def layout_of(tensor: Tensor, *, except_dim: int | None = None) -> Layout | None:
    """How a tensor lies on its mesh; None for a plain one.

    With ``except_dim``, only as far as it is split along other dimensions of its own than this one.
    """
    if not is_dtensor(tensor):
        return None
    mesh = tensor.device_mesh
    if mesh.get_coordinate() is None:  # a rank outside the mesh holds nothing, and takes no part
        return Layout(mesh, ())
    return Layout(
        mesh,
        tuple(
            i
            for i, placement in enumerate(tensor.placements)
            if mesh.size(i) > 1
            and not (placement.is_replicate() or placement.is_partial())
            # Not only Shard, but also its variants, which have a dim as well.
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
    if not any_dtensor(tensors):
        return list(tensors)
    dtensor: Any = dtensor_types()
    with torch.no_grad():  # autograd would make a copy
        return [t.to_local() if isinstance(t, dtensor) else t for t in tensors]


def is_partial(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor that is pending a reduction."""
    return is_dtensor(tensor) and any(placement.is_partial() for placement in tensor.placements)


def without_partial(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, with reduced copies of those that are pending a reduction.

    Tensors that are pending on the same dimension of a mesh are reduced in one collective.
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
    from torch.distributed.tensor import DTensor, Replicate

    result = list(tensors)
    for (mesh, dim, placement, _), places in pending.items():
        chosen = [cast("DTensor", result[i]) for i in places]
        held = locals_of(chosen)
        with torch.no_grad():
            together = torch.cat([local.reshape(-1) for local in held])
        _all_reduce(together, placement.reduce_op, mesh.get_group(dim))
        parts = torch.split(together, [local.numel() for local in held])
        for i, t, local, part in zip(places, chosen, held, parts, strict=True):
            placements = [Replicate() if d == dim else each for d, each in enumerate(t.placements)]
            result[i] = DTensor.from_local(
                part.view(local.shape),
                mesh,
                placements,
                run_check=False,
                shape=t.shape,
                stride=t.stride(),
            )
    return result


def _all_reduce(tensor: Tensor, operation: str, group: dist.ProcessGroup) -> None:
    """Reduce a tensor in place as its placement says; not every backend can compute a mean."""
    is_mean = operation == "avg"
    dist.all_reduce(tensor, getattr(dist.ReduceOp, "SUM" if is_mean else operation.upper()), group)
    if is_mean:
        tensor.div_(group.size())


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
