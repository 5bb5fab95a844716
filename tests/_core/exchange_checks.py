"""Checks of what ranks exchange: how often, and that the two ways give the same bits."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_helpers import world_of
from dtensors import addends, collectives_of, parameter, split
from helpers import randn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import torchclip
from torchclip._core import collectives, messages
from torchclip.clipper import Scope

INF = math.inf


def check_number_of_collectives() -> None:
    everyone = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    pair = grid["tp"]
    full = randn(8, 8)

    def count(*grads: Tensor, clip: Callable[..., Any] = torchclip.clip_grad_norm_, **options: Any) -> int:
        parameters = [parameter(grad) for grad in grads]
        return len(collectives_of(lambda: clip(parameters, 1.0, **options)))

    per_parameter = torchclip.clip_grad_norm_per_parameter_
    sharded = [split(full, everyone, Shard(0)) for _ in range(20)]
    assert count(*sharded) == 1
    assert count(*sharded, clip=per_parameter) == 2  # the norms follow the head
    replicated = [split(full, everyone, Replicate()), split(full, grid, Replicate(), Replicate())]
    assert count(*replicated) == 0
    assert count(full.clone()) == 0
    fsdp_tp = [
        split(full, grid, _StridedShard(0, split_factor=2), Shard(0)),
        split(full, grid, Shard(0), Replicate()),
        split(full, grid, Shard(0), Shard(1)),
    ]
    expert = split(full, pair, Shard(0))
    assert count(*fsdp_tp) == 1
    assert count(*fsdp_tp, *replicated, *sharded, full.clone()) == 1
    assert count(*fsdp_tp, expert) == 2
    assert count(*fsdp_tp, expert, group=dist.group.WORLD) == 1
    # Norms of single parameters go along each of the mesh's two dimensions.
    assert count(*fsdp_tp, expert, clip=per_parameter) == 2
    assert count(expert, split(full, pair, Shard(1))) == 1
    assert count(full.clone(), group=dist.group.WORLD) == 1
    # One more reduction for all pending sums.
    assert count(*[addends(full, everyone, Partial()) for _ in range(3)], *sharded) == 2
    # Nothing is exchanged for tensors that are not split.
    alone = init_device_mesh("cpu", (4, 1))
    assert count(split(full, alone, Replicate(), Shard(0))) == 0
    value = lambda parameters, limit: torchclip.clip_grad_value_(parameters, limit)  # noqa: E731
    assert count(*sharded, clip=value) == 0


def check_parameter_groups_take_one_exchange() -> None:
    """Two messages for 24 parameter groups, each with its own norm."""
    mesh = init_device_mesh("cpu", (4,))
    fulls = [randn(8, 5, seed=i) for i in range(24)]
    parameters = [parameter(split(full, mesh, Shard(0))) for full in fulls]
    scopes: list[Scope] = ["group", "parameter"]
    for scope in scopes:
        optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.0)
        with torchclip.Clipper(optimizer, INF, scope=scope):
            assert len(collectives_of(optimizer.step)) == 2
    for p, full in zip(parameters, fulls, strict=True):
        assert torch.equal(p.grad.full_tensor(), full)
        assert isinstance(p.grad, DTensor)


@world_of(2)
def check_gather_and_reductions_give_the_same_bits() -> None:
    """Among few and many ranks, for all orders, also for infinite, NaN and missing norms."""
    rank = dist.get_rank()
    group: Any = dist.group.WORLD
    generator = torch.Generator().manual_seed(0)
    for order in (0.0, 0.5, 1.0, 2.0, 3.0, -1.0, -2.5, 100.0, INF, -INF):
        for count in (1, 3, 9):
            for _ in range(10):
                both = 10.0 ** (20 * torch.rand(2, count, generator=generator, dtype=torch.float64) - 10)
                both = both.ceil() if order == 0 else both
                odd = torch.tensor([0.0, INF, math.nan, -1.0], dtype=torch.float64)
                chosen = torch.rand(2, count, generator=generator) < 0.2
                kinds = torch.randint(4, (2, count), generator=generator)
                both = torch.where(chosen & (order != 0), odd[kinds], both)
                results = []
                for many, rooted in ((2, 3), (3, 3), (3, 2)):
                    with pytest.MonkeyPatch.context() as patch:
                        patch.setattr(messages, "MANY_ON_HOST", many)
                        patch.setattr(messages, "ROOTED", rooted)
                        call = collectives.Call(collectives.Kind.MEASURE, order, facts=1 << 2 * rank)
                        norms, _ = collectives.exchange(group, both[rank].tolist(), (), call, "cpu")
                        call.finish()
                        assert call.facts == 0b101
                        results.append(torch.tensor(norms, dtype=torch.float64).view(torch.int64))
                assert torch.equal(results[0], results[1])
                assert torch.equal(results[0], results[2])
                for norm, pair in zip(results[0].view(torch.float64).tolist(), both.T.tolist(), strict=True):
                    expected = exactly([n for n in pair if not n < 0], order)
                    assert norm == pytest.approx(expected, rel=1e-13, nan_ok=True)


def exactly(norms: list[float], order: float) -> Any:
    """The joint norm of a few norms, as the book would write it."""
    if not norms:
        return -1.0
    if any(map(math.isnan, norms)):
        return math.nan
    if math.isinf(order):
        return max(norms) if order > 0 else min(norms)
    if order == 0:
        return sum(norms)
    leading = max(norms) if order > 0 else min(norms)
    if leading in (0, INF):
        return leading
    return leading * math.fsum((n / leading) ** order for n in norms) ** (1 / order)
