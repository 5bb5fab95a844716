"""What each rank has of each parameter, gathered on all ranks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from torchclip._core.ranks import meshes
from torchclip.ranks_report.fingerprints import Fingerprint, fingerprint

Ranks = tuple[int, ...]


class Held(NamedTuple):
    """A rank's part of a parameter.

    Attributes:
        part: which part of a DTensor it is, by its coordinate on the mesh; empty if the parameter is plain.
        mesh: the ranks of the DTensor's mesh; empty if the parameter is plain.
        weight: the fingerprint of the weight.
        gradient: the fingerprint of the gradient; None if there is none.
    """

    part: str
    mesh: Ranks
    weight: Fingerprint
    gradient: Fingerprint | None


class Facts(NamedTuple):
    """What a rank has.

    Attributes:
        held: its part of each parameter, by name.
        groups: the descriptions and the ranks of all its process groups, oldest first.
        passed: the ranks of the process groups that it passes to the call.
    """

    held: dict[str, Held]
    groups: list[tuple[str, Ranks]]
    passed: list[Ranks]


def gathered(held: dict[str, Held], groups: Sequence[dist.ProcessGroup]) -> list[Facts]:
    """What each rank has, from this rank's parts and the process groups that it passes to the call."""
    if not meshes.has_ranks():
        return [Facts(held, [], [])]
    existing = [(str(group.group_desc), _ranks(group)) for group in _process_groups()]
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, Facts(held, existing, [_ranks(group) for group in groups]))
    if None in of_ranks:
        raise RuntimeError(
            f"rank {of_ranks.index(None)} refused its arguments, as its own error says; so check_ranks was "
            "called off on all ranks"
        )
    return of_ranks


def call_off() -> None:
    """Tell the other ranks that this one refuses its arguments, so that all raise an error."""
    if meshes.has_ranks():
        dist.all_gather_object([None] * dist.get_world_size(), None)


def held_here(named: dict[str, Tensor]) -> dict[str, Held]:
    """This rank's part of each parameter, by name."""
    held: dict[str, Held] = {}
    seen: set[int] = set()
    for name, p in named.items():
        if p.is_meta:
            raise ValueError(f"parameter {name!r} is on the device 'meta' and has no values; load it first")
        grad = None if id(p.grad) in seen else p.grad  # a gradient that parameters share counts once
        seen.add(id(grad))
        try:
            own = _held(p, grad)
        except (RuntimeError, TypeError) as error:
            raise type(error)(f"parameter {name!r} cannot be compared: {error}") from error
        if own is not None:
            held[name] = own
    return held


def _held(p: Any, grad: Any) -> Held | None:
    """This rank's part of a parameter; None if the rank is outside of its mesh."""
    part = ""
    ranks: Ranks = ()
    if meshes.is_dtensor(p):
        here = p.device_mesh.get_coordinate()
        if here is None:
            return None
        of_each = zip(p.placements, here, p.device_mesh.shape, strict=True)
        part = ", ".join(f"{how} {i} of {size}" for how, i, size in of_each if not how.is_replicate())
        ranks = _mesh_ranks(p.device_mesh)
        # A sum may be pending, or the gradient may be split in another way.
        grad = None if grad is None else grad.redistribute(placements=p.placements).to_local()
        p = p.to_local()
    return Held(part, ranks, fingerprint(p), None if grad is None else fingerprint(grad))


@functools.lru_cache
def _mesh_ranks(mesh: Any) -> Ranks:
    """One object for all parameters on a mesh, so that it is sent once."""
    return tuple(sorted(mesh.mesh.flatten().tolist()))


def _process_groups() -> list[dist.ProcessGroup]:
    """The process groups of this rank, oldest first: torch keeps them as keys of dictionaries."""
    kept = [held for held in vars(dist.distributed_c10d).values() if issubclass(type(held), dict)]
    return list(dict.fromkeys(key for held in kept for key in held if isinstance(key, dist.ProcessGroup)))


def _ranks(group: dist.ProcessGroup) -> Ranks:
    return tuple(sorted(dist.get_process_group_ranks(group)))
