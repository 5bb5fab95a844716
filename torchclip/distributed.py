"""What a sharded tensor is made of on this rank, and norms across ranks.

A DTensor lies on a mesh of ranks.  Along some dimensions of the mesh it is split, along the others each rank
has a copy.  Its norm is the joint norm of the parts along the former: a copy is counted once.

Ranks exchange norms, not sums of powers: they cannot overflow, every rank combines the same numbers in the
same order, and so all get the same result to the last bit.  All ranks of a mesh must make the same calls with
the same parameters; it does not matter whether these have a gradient on every rank.
"""

from __future__ import annotations

import functools
import hashlib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor

from torchclip import arguments
from torchclip.combine import combine_tensors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

__all__ = [
    "Layout",
    "across_groups",
    "across_meshes",
    "as_groups",
    "has_ranks",
    "is_partial",
    "is_sharded",
    "layout_of",
    "locals_of",
    "neutral",
    "without_partial",
]

# How many layouts one exchange can carry; real models have up to about four.
_SLOTS = 16


class Layout(NamedTuple):
    """A mesh, and the dimensions of it along which a tensor is split."""

    mesh: DeviceMesh
    dims: tuple[int, ...]


def has_ranks() -> bool:
    """Whether there are other processes at all."""
    return dist.is_available() and dist.is_initialized()


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor."""
    # The module is slow to import, and without it there can be none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def layout_of(tensor: Tensor, *, except_dim: int | None = None) -> Layout | None:
    """How a tensor is split; None if this rank has all of it.

    With ``except_dim``, only as far as it is split along other dimensions of its own than this one.
    """
    if not is_sharded(tensor):
        return None
    dims = tuple(
        i
        for i, placement in enumerate(tensor.placements)
        if not (placement.is_replicate() or placement.is_partial())
        # Not only Shard, also the other kinds of it, which have a dim as well.
        and cast("Shard", placement).dim != except_dim
    )
    return Layout(tensor.device_mesh, dims) if dims else None


def without_partial(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with those that are pending a reduction reduced, into copies.

    All that are pending on the same dimension of a mesh are reduced in one collective.
    """
    pending: dict[tuple[Any, ...], list[int]] = {}
    for i, tensor in enumerate(tensors):
        if is_sharded(tensor):
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


def locals_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor, in the tensor's own memory."""
    with torch.no_grad():
        return [t.to_local() if is_sharded(t) else t for t in tensors]


def is_partial(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor that is pending a reduction."""
    return is_sharded(tensor) and any(placement.is_partial() for placement in tensor.placements)


def neutral(p: float) -> float:
    """The norm of a part without elements, which changes no joint norm."""
    return math.inf if p < 0 else 0.0


def across_meshes(vectors: Mapping[Layout | None, Tensor], p: float) -> dict[Layout | None, Tensor]:
    """Join this rank's norms with those of the ranks that hold the other parts, element by element.

    Args:
        vectors: for each layout, norms of parts that lie like this: float64, one dimension.
        p: the order of the norms.

    Returns:
        The joint norms, the same on every rank that holds a part; those without a layout as they are.
    """
    split = {layout: vector for layout, vector in vectors.items() if layout is not None}
    joint = _across_meshes(split, p)
    return {layout: vector if layout is None else joint[layout] for layout, vector in vectors.items()}


def _across_meshes(vectors: Mapping[Layout, Tensor], p: float) -> Mapping[Layout, Tensor]:
    groups = list(dict.fromkeys(layout.mesh.get_group(d) for layout in vectors for d in layout.dims))
    if len(groups) > 1 and all(len(v) == 1 for v in vectors.values()) and _span_world(vectors):
        return _across_world(vectors, p)
    joint = dict(vectors)
    for group in groups:
        split = [layout for layout in vectors if any(layout.mesh.get_group(d) is group for d in layout.dims)]
        gathered = _gather(torch.cat([joint[layout] for layout in split]), group)
        combined = torch.split(combine_tensors(gathered.T, p), [len(joint[layout]) for layout in split])
        joint.update(zip(split, combined, strict=True))
    return joint


def across_groups(norm: Tensor, groups: Sequence[dist.ProcessGroup], p: float) -> Tensor:
    """Join a norm (0-dim) with those of the other ranks of each group."""
    for group in groups:
        # Somebody's pipeline stage may lie on the CPU, another's on an accelerator; the group decides.
        device = torch.device(dist.distributed_c10d._get_object_coll_device(group))
        norm = combine_tensors(_gather(norm.reshape(1).to(device), group).T, p)[0]
    return norm


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


def _gather(vector: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's vector, as the rows of a matrix."""
    rows = [torch.empty_like(vector) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, vector.contiguous(), group=group)
    return torch.stack(rows)


def _span_world(layouts: Iterable[Layout]) -> bool:
    """Whether one of the meshes has all ranks, so that all of them make this call."""
    return any(layout.mesh.size() == dist.get_world_size() for layout in layouts)


def _across_world(vectors: Mapping[Layout, Tensor], p: float) -> dict[Layout, Tensor]:
    """:func:`across_meshes` for one norm a layout, in a single collective among all ranks.

    Ranks may have different meshes besides the one that they share, so what they send is labelled.
    """
    if len(vectors) > _SLOTS:
        raise RuntimeError(
            f"gradients are split in {len(vectors)} different ways over the meshes, more than {_SLOTS}; clip "
            "them in several calls, with the norms from get_total_norm"
        )
    some = next(iter(vectors.values()))
    labels = some.new_tensor([_label(layout) for layout in vectors])
    sent = some.new_full((2, _SLOTS), neutral(p))
    sent[0].fill_(-1.0)[: len(labels)] = labels
    sent[1, : len(labels)] = torch.cat(list(vectors.values()))
    world = cast("dist.ProcessGroup", dist.group.WORLD)
    gathered = _gather(sent.view(-1), world).view(-1, 2, _SLOTS)
    joint = {}
    for layout, label in zip(vectors, labels, strict=True):
        holders = gathered[_holders(layout)]
        values = torch.where(holders[:, 0] == label, holders[:, 1], neutral(p))
        # One slot of a rank has the value, the others are neutral.
        of_ranks = values.amin(dim=1) if p < 0 else values.amax(dim=1)
        joint[layout] = combine_tensors(of_ranks, p).reshape(1)
    return joint


@functools.lru_cache
def _holders(layout: Layout) -> list[int]:
    """The ranks that hold the other parts of what this rank has a part of, and itself."""
    here = cast("Sequence[int]", layout.mesh.get_coordinate())
    at = tuple(slice(None) if d in layout.dims else here[d] for d in range(layout.mesh.ndim))
    return layout.mesh.mesh[at].flatten().tolist()


@functools.lru_cache
def _label(layout: Layout) -> float:
    """A number that the ranks of a mesh agree on, another for another mesh: a hash that fits a float64."""
    text = repr((layout.mesh.mesh.tolist(), layout.dims))
    return float(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big"))
