"""Checks of how often ranks exchange something."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from dtensors import addends, collectives_of, parameter, split
from helpers import randn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import torchclip
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
