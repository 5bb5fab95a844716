"""What each rank has of each parameter, gathered on all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from torchclip._core.ranks import meshes
from torchclip.ranks_report.fingerprints import Fingerprints

Ranks = tuple[int, ...]


class Held(NamedTuple):
    """What a rank has of a parameter.

    Attributes:
        part: which part of a DTensor it is, by its coordinate on the mesh; empty if the parameter is plain.
        mesh: the ranks of the DTensor's mesh; empty if the parameter is plain.
        weight: the fingerprint of the weight.
        norm: the norm of the gradient; None if there is no gradient.
        projections: of the gradient, as in ``Fingerprints``.
        is_moved: whether the gradient is to be moved first: a sum is pending, or it is split in another way
            than the parameter.
    """

    part: str
    mesh: Ranks
    weight: int
    norm: float | None = None
    projections: tuple[float, ...] = ()
    is_moved: bool = False


class Facts(NamedTuple):
    """What a rank has.

    Attributes:
        held: what it has of each parameter, by name.
        groups: the descriptions and the ranks of all its process groups, oldest first.
        passed: the ranks of the process groups that it passes to the call.
    """

    held: dict[str, Held]
    groups: list[tuple[str, Ranks]]
    passed: list[Ranks]


def gathered(
    named: dict[str, Tensor], held: dict[str, Held], groups: Sequence[dist.ProcessGroup]
) -> list[Facts]:
    """What each rank has.

    An exchange begins with the sizes of the messages, so ranks may have different numbers of parameters.

    Args:
        named: this rank's parameters.
        held: what it has of them.
        groups: the process groups that it passes to the call.
    """
    if not meshes.has_ranks():
        return [Facts(held, [], [])]
    existing = [(str(group.group_desc), _ranks(group)) for group in _process_groups()]
    own = Facts(held, existing, [_ranks(group) for group in groups])
    of_ranks = _exchanged(own)
    if any(each.is_moved for facts in of_ranks for each in facts.held.values()):
        _check_not_waiting(of_ranks)
        _move(named, held)
        of_ranks = _exchanged(own)
    return of_ranks


def call_off() -> None:
    """Tell the other ranks that this one refuses its arguments, so that all raise an error."""
    if meshes.has_ranks():
        dist.all_gather_object([None] * dist.get_world_size(), None)


def _exchanged(own: Facts) -> list[Facts]:
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    if None in of_ranks:
        raise RuntimeError(
            f"rank {of_ranks.index(None)} refused its arguments, as its own error says; so check_ranks was "
            "called off on all ranks"
        )
    return of_ranks


def held_here(named: dict[str, Tensor]) -> dict[str, Held]:
    """What this rank has; gradients that are to be moved, which takes all ranks of a mesh, come later."""
    fingerprints = Fingerprints()
    held: dict[str, Held] = {}
    seen: set[int] = set()
    known: dict[Ranks, Ranks] = {}  # one object for all parameters on a mesh, which is sent once
    for name, p in named.items():
        if p.is_meta:
            raise ValueError(f"parameter {name!r} is on the device 'meta' and has no values; load it first")
        on_mesh = _on_mesh(p)
        if on_mesh is None:
            continue
        part, ranks = on_mesh
        grad: Any = None if id(p.grad) in seen else p.grad  # a gradient that parameters share counts once
        seen.add(id(grad))
        try:
            own = Held(part, known.setdefault(ranks, ranks), fingerprints.of_bits(_local(p)))
            if meshes.is_dtensor(grad) and grad.placements != _placements(p, grad):
                own = own._replace(is_moved=True)
            elif grad is not None:
                norm, projections = fingerprints.of_gradient(_local(grad))
                own = own._replace(norm=norm, projections=projections)
        except (RuntimeError, TypeError) as error:
            raise type(error)(f"parameter {name!r} cannot be compared: {error}") from error
        held[name] = own
    return held


def _on_mesh(p: Any) -> tuple[str, Ranks] | None:
    """This rank's part of a parameter, and the ranks of its mesh; None if it has nothing of it."""
    lies = p if meshes.is_dtensor(p) or p.grad is None else p.grad
    if not meshes.is_dtensor(lies):
        return "", ()
    here = lies.device_mesh.get_coordinate()
    if here is None:
        return None
    of_each = zip(_placements(p, lies), here, lies.device_mesh.shape, strict=True)
    part = [f"{how} {place} of {size}" for how, place, size in of_each if not how.is_replicate()]
    return ", ".join(part), tuple(sorted(lies.device_mesh.mesh.flatten().tolist()))


def _placements(p: Any, grad: Any) -> tuple[Any, ...]:
    """How a DTensor gradient lies once it is moved: like its parameter, and no sum is pending."""
    from torch.distributed.tensor import Replicate

    lies = p if meshes.is_dtensor(p) else grad
    return tuple(Replicate() if each.is_partial() else each for each in lies.placements)


def _move(named: dict[str, Tensor], held: dict[str, Held]) -> None:
    """Measure the gradients that are to be moved, in the same order on all ranks of a mesh."""
    fingerprints = Fingerprints()
    for name in sorted(name for name, own in held.items() if own.is_moved):
        grad: Any = named[name].grad
        moved = grad.redistribute(placements=_placements(named[name], grad))
        norm, projections = fingerprints.of_gradient(_local(moved))
        held[name] = held[name]._replace(norm=norm, projections=projections)


def _check_not_waiting(of_ranks: Sequence[Facts]) -> None:
    """Raise an error for gradients that some ranks of a mesh would move, and wait for others to."""
    moved = Counter(
        (name, own.mesh) for facts in of_ranks for name, own in facts.held.items() if own.is_moved
    )
    for (name, ranks), count in moved.items():
        if count < len(ranks):
            raise RuntimeError(
                f"parameter {name!r} has a gradient that is pending a reduction, or split differently from "
                f"the parameter, on {count} of the {len(ranks)} ranks of its mesh only, so clipping would "
                "wait for the others; have a gradient on all of them, such as zeros"
            )


def _process_groups() -> list[dist.ProcessGroup]:
    """The process groups of this rank, oldest first: torch keeps them as keys of dictionaries."""
    kept = [held for held in vars(dist.distributed_c10d).values() if issubclass(type(held), dict)]
    return list(dict.fromkeys(key for held in kept for key in held if isinstance(key, dist.ProcessGroup)))


def _ranks(group: dist.ProcessGroup) -> Ranks:
    return tuple(sorted(dist.get_process_group_ranks(group)))


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if meshes.is_dtensor(tensor) else tensor
    return local.detach()
