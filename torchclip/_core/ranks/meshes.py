"""How a DTensor lies on its mesh of ranks, and which part of it this rank holds.

Along some dimensions of the mesh a tensor is split; along the others ranks have replicas.  Its norm is the
joint norm of the parts, of which each counts once.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeGuard, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from torchclip._core import arguments

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Ranks: TypeAlias = "frozenset[int] | None"
"""A set of ranks; None for all ranks, of which there may be very many."""


class Layout(NamedTuple):
    """How a DTensor lies, as far as its norm depends on it.

    Attributes:
        mesh: its mesh.
        dims: the dimensions of the mesh along which it is split over several ranks, in order.
        part: which part this rank has: its coordinates along these dimensions.
        replicas: how many ranks have this part, or addends of a pending sum.
        is_first: whether this is the first of them.
        is_pending: whether it is pending a reduction.
    """

    mesh: DeviceMesh
    dims: tuple[int, ...] = ()
    part: tuple[int, ...] = ()
    replicas: int = 1
    is_first: bool = False
    is_pending: bool = False


PLAIN = Layout(cast("DeviceMesh", None), is_first=True)
"""The layout of a tensor that is not a DTensor."""

# Layouts by the identity of the spec of a DTensor, and by what is in it: the same object for those that lie
# alike.  The specs are kept, so that no other object gets their id, or that of their mesh.
_layouts: dict[int, Layout] = {}
_equal_layouts: dict[tuple[int, Any], Layout] = {}
_kept: list[Any] = []
_MOST_KEPT = 1 << 16
# A DTensor's part and its spec: the public names take ten times as long, in each call.
_part: Callable[[Any], Tensor] = operator.attrgetter("_local_tensor")
_spec: Callable[[Any], Any] = operator.attrgetter("_spec")
# Equal meshes have the same ranks.
_ranks: WeakKeyDictionary[DeviceMesh | dist.ProcessGroup, frozenset[int]] = WeakKeyDictionary()

# DTensors


def _dtensor_types() -> tuple[type, ...]:
    """The class DTensor; nothing if there can be none, as its module, slow to import, was not imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else (module.DTensor,)


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor."""
    return isinstance(tensor, _dtensor_types())


def any_dtensor(tensors: Iterable[Tensor]) -> bool:
    """Whether any of the tensors is a DTensor."""
    types = _dtensor_types()
    return bool(types) and any(issubclass(kind, types) for kind in set(map(type, tensors)))


def layouts_of(tensors: Sequence[Tensor]) -> list[Layout]:
    """How each tensor lies on its mesh; the same object for those that lie alike.

    It must be quick: comparing placements takes as long as all other work for a DTensor.
    """
    if not any_dtensor(tensors):
        return [PLAIN] * len(tensors)
    try:
        layouts = list(map(_layouts.get, map(id, map(_spec, tensors))))
    except AttributeError:  # some are plain
        layouts = [None]
    if None in layouts:
        return [_known_layout(_spec(t)) if is_dtensor(t) else PLAIN for t in tensors]
    return cast("list[Layout]", layouts)


def _known_layout(spec: Any) -> Layout:
    layout = _layouts.get(id(spec))
    if layout is None:
        if len(_kept) >= _MOST_KEPT:
            for known in (_layouts, _equal_layouts, _kept):
                known.clear()
        key = (id(spec.mesh), spec.placements)
        layout = _equal_layouts.get(key) or _layout(spec.mesh, spec.placements)
        _layouts[id(spec)] = _equal_layouts[key] = layout
        _kept.append(spec)
    return layout


def _layout(mesh: DeviceMesh, placements: Sequence[Any]) -> Layout:
    here = mesh.get_coordinate()
    if here is None:  # a rank outside the mesh holds nothing, and takes no part
        return Layout(mesh)
    wide = [dim for dim in range(mesh.ndim) if mesh.size(dim) > 1]
    dims = tuple(dim for dim in wide if not is_whole(placements[dim]))
    whole = [dim for dim in wide if dim not in dims]
    return Layout(
        mesh,
        dims,
        part=tuple(here[dim] for dim in dims),
        replicas=math.prod(mesh.size(dim) for dim in whole),
        is_first=all(here[dim] == 0 for dim in whole),
        is_pending=any(placement.is_partial() for placement in placements),
    )


def is_whole(placement: Any) -> bool:
    """Whether ranks have all of a tensor along a dimension; else its axis is ``placement.dim``."""
    return bool(placement.is_replicate() or placement.is_partial())


def locals_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor, in the tensor's own memory."""
    if not any_dtensor(tensors):
        return list(tensors)
    try:
        return list(map(_part, tensors))
    except AttributeError:  # some are plain
        return [_part(tensor) if is_dtensor(tensor) else tensor for tensor in tensors]


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; -1 for one of inference mode, whose changes nobody counts.

    A DTensor and this rank's part of it have a counter each.  FSDP2 adds gradients to the part.
    """
    if tensor.is_inference():
        return -1
    return tensor._version + version_of(_part(tensor)) if is_dtensor(tensor) else tensor._version


def pending(tensor: Tensor) -> set[str]:
    """The reductions that a tensor is pending, such as "sum"; none for a plain one."""
    placements: Any = tensor.placements if is_dtensor(tensor) else ()
    return {placement.reduce_op for placement in placements if placement.is_partial()}


def reduced_locals_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor; reduced copies of those that are pending a reduction.

    Tensors that are pending on the same dimension of a mesh are reduced in one collective.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, tensor in enumerate(tensors):
        if not is_dtensor(tensor) or tensor.device_mesh.get_coordinate() is None:
            continue  # of a mesh without this rank, only the ranks of that mesh take part
        for dim, placement in enumerate(tensor.placements):
            if placement.is_partial():
                alike.setdefault((tensor.device_mesh, dim, placement, tensor.dtype), []).append(i)
    held = locals_of(tensors)
    for (mesh, dim, placement, _), places in alike.items():
        with torch.no_grad():
            together = torch.cat([held[i].reshape(-1) for i in places])
        group, is_mean = mesh.get_group(dim), placement.reduce_op == "avg"  # which not all backends compute
        op = getattr(dist.ReduceOp, "SUM" if is_mean else placement.reduce_op.upper())
        dist.all_reduce(together, op, group)
        together = together / group.size() if is_mean else together
        for i, part in zip(places, together.split([held[i].numel() for i in places]), strict=True):
            held[i] = part.view(held[i].shape)
    return held


# Ranks


def has_ranks() -> bool:
    """Whether there are other processes at all."""
    return dist.is_available() and dist.is_initialized()


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


def ranks_of(group: DeviceMesh | dist.ProcessGroup) -> Ranks:
    """The ranks of a mesh or of a process group."""
    if group.size() == dist.get_world_size():
        return None
    if group not in _ranks:
        held: Any = group
        is_group = isinstance(group, dist.ProcessGroup)
        ranks = dist.get_process_group_ranks(held) if is_group else held.mesh.flatten().tolist()
        _ranks[group] = frozenset(ranks)
    return _ranks[group]


def are_within(ranks: Ranks, among: Ranks) -> bool:
    """Whether all of some ranks are among others."""
    return among is None or (ranks is not None and ranks <= among)


def is_first(ranks: Ranks, among: Ranks) -> bool:
    """Whether this rank is the first of the ranks that two sets have in common."""
    known = [some for some in (ranks, among) if some is not None]
    first = min(frozenset.intersection(*known), default=-1) if known else 0
    return dist.get_rank() == first


def groups_over(mesh: DeviceMesh) -> list[dist.ProcessGroup]:
    """Process groups that together connect all ranks of a mesh: that of all ranks, or one a dimension."""
    wide = [dim for dim in range(mesh.ndim) if mesh.size(dim) > 1]
    if len(wide) > 1 and mesh.size() == dist.get_world_size():
        return [cast("dist.ProcessGroup", dist.group.WORLD)]
    return [mesh.get_group(dim) for dim in wide]


def device_of(group: dist.ProcessGroup, preferred: str | None = None) -> str:
    """The type of the device that the collectives of a group work on: the preferred one if they can."""
    # Such as "cpu:gloo,cuda:nccl".  The tensors of one rank may lie on the CPU, another's on an accelerator.
    devices = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]
    if preferred is not None and preferred in devices:
        return preferred
    return "cpu" if "cpu" in devices else devices[0]
