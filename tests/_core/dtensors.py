"""DTensors for the checks on ranks."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import bits
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import torchclip
from torchclip._core.ranks import exchange
from torchclip._core.scalars import on_device


def split(full: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    """A DTensor of a value that all ranks have, so nothing is exchanged."""
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


def parameter(grad: Tensor | None, like: Tensor | None = None) -> Any:
    """A parameter with the placement of its gradient, or of another tensor; typed as Any, as there."""
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
    """The collectives of a call, from torch's profiler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
    return [event.name for event in profile.events() if event.name.startswith("gloo:")]


def addends(full: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    """A pending sum: a DTensor that has this value after the ranks' addends are reduced."""
    where = [Replicate() if p.is_partial() else p for p in placements]
    held = split(full, mesh, *where).to_local().clone()
    for dim, placement in enumerate(placements):
        if isinstance(placement, Partial) and mesh.get_coordinate() is not None:
            # Powers of two: exact in every dtype.
            ranks, place = mesh.size(dim), mesh.get_local_rank(dim)
            shares = [2.0**-i for i in range(1, ranks)] + [2.0 ** (1 - ranks)]
            held = held * (shares[place] * (ranks if placement.reduce_op == "avg" else 1))
    return DTensor.from_local(held, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())


def as_on_an_accelerator(patch: pytest.MonkeyPatch) -> None:
    """Ranks exchange norms without reading anything, as where the host must not wait."""
    patch.setattr(exchange, "_readable", lambda norms, device: (on_device(norms, device), False))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(actual: Tensor, expected: Tensor) -> None:
    # The product of each addend is rounded, as is that of the sum: the last digit may differ.
    pending = isinstance(actual, DTensor) and any(p.is_partial() for p in actual.placements)
    rtol = max(torch.finfo(actual.dtype).eps, 1e-14) * (4 if pending else 1)
    torch.testing.assert_close(whole(actual), expected, rtol=rtol, atol=0, equal_nan=True)


def compare(fulls: Sequence[Tensor], grads: Sequence[Tensor], clip: Callable[..., Any]) -> None:
    """The same result and the same gradients as of the full tensors, and the same result on every rank."""
    oracle = [parameter(full.clone()) for full in fulls]
    parameters = [parameter(grad) for grad in grads]
    versions = [grad._version for grad in grads]
    memory = [grad.to_local().data_ptr() if isinstance(grad, DTensor) else None for grad in grads]
    expected, actual = clip(oracle), clip(parameters)
    if expected is not None:
        assert_agreed(actual)
        assert actual.dtype == expected.dtype
        rtol = 1e-12 if actual.dtype == torch.float64 else 0
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=0, equal_nan=True)
    if all(torch.equal(q.grad, full) for q, full in zip(oracle, fulls, strict=True)):
        assert [grad._version for grad in grads] == versions  # what autograd has saved stays valid
    for full, before, at, grad, p, q in zip(fulls, versions, memory, grads, parameters, oracle, strict=True):
        assert p.grad is grad
        assert_same(grad, q.grad)
        if isinstance(grad, DTensor):
            assert grad.to_local().data_ptr() == at
        if not torch.equal(q.grad, full):
            assert grad._version > before


def global_norm(limit: float, order: float | str = 2.0) -> Callable[..., Tensor]:
    return lambda parameters: torchclip.clip_grad_norm_(parameters, limit, order)


def with_norm(limit: float, order: float | str) -> Callable[..., Tensor]:
    def clip(parameters: list[Any]) -> Tensor:
        norm = torchclip.get_total_norm([p.grad for p in parameters], order)
        torchclip.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    return clip
