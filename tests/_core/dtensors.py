"""DTensors for the checks on ranks."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from helpers import bits
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

__all__ = ["assert_agreed", "collectives_of", "parameter", "placed", "split"]


def placed(full: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A DTensor of this value, which all ranks have: nothing is exchanged."""
    if "src_data_rank" in inspect.signature(distribute_tensor).parameters:  # since torch 2.7
        return distribute_tensor(full.clone(), mesh, placements, src_data_rank=None)
    held = full
    here = mesh.get_coordinate()
    for dim, placement in enumerate(placements):
        if here is not None and isinstance(placement, Shard):
            parts, _ = placement._split_tensor(held, mesh.size(dim), with_padding=False, contiguous=True)
            held = parts[here[dim]]
    return DTensor.from_local(
        held.clone(), mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
    )


def split(full: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    """A DTensor that has this value."""
    return placed(full, mesh, placements)


def parameter(grad: Tensor | None, like: Tensor | None = None) -> Any:
    """A parameter that lies as its gradient, or as another tensor, does; it passes for anything, as there."""
    like = grad if like is None else like
    assert like is not None
    if isinstance(like, DTensor) and any(p.is_partial() for p in like.placements):
        where = [Replicate() if p.is_partial() else p for p in like.placements]
        like = split(torch.zeros(like.shape, dtype=like.dtype), like.device_mesh, *where)
    result = nn.Parameter(torch.zeros_like(like))
    result.grad = grad
    return result


def assert_agreed(value: Tensor, group: Any = None) -> None:
    """The same bits on all ranks, in a plain tensor."""
    assert type(value) is Tensor
    of_ranks = [None] * dist.get_world_size(group)
    dist.all_gather_object(of_ranks, (value.dtype, bits(value)), group=group)
    assert len(set(of_ranks)) == 1, value


def collectives_of(call: Callable[..., Any]) -> list[str]:
    """The collectives of a call, as torch's profiler saw them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
    return [event.name for event in profile.events() if event.name.startswith("gloo:")]
