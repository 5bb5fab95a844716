"""Checks that replicas count once, and are treated alike on all ranks."""

import math

import pytest
import torch
import torch.distributed as dist
from distributed_helpers import world_of
from dtensors import as_on_an_accelerator, assert_agreed, parameter, split
from helpers import randn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.utils.flop_counter import FlopCounterMode

import torchclip

INF = math.inf


def check_replicas_that_have_gradients_of_different_parameters() -> None:
    """All ranks of the mesh raise, nothing has changed, and the next call works."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    ways = [(Replicate(), Shard(0)), (Shard(1), Replicate()), (Shard(0), Shard(1))]
    fulls = [randn(8, 5, seed=i) for i in range(3)]
    grads = [split(full, mesh, *way) for full, way in zip(fulls, ways, strict=True)]
    # By rank the parameters that lack a gradient; different parts of the third have no replicas.
    cases: list[list[list[int]]] = [[[0], [], [], []], [[], [], [0, 1], [0]], [[0], [1], [1], [0]]]
    for lacking in cases:
        ps = [parameter(None if i in lacking[rank] else g.clone(), like=g) for i, g in enumerate(grads)]
        for clip in (torchclip.clip_grad_norm_, torchclip.clip_grad_norm_per_parameter_):
            with pytest.raises(RuntimeError, match="replicas of the same parameters") as caught:
                clip(ps, 0.1)
            for i in range(3):
                assert (f"parameter {i} of shape" in str(caught.value)) == (i in lacking[rank])
            assert ("others lack" in str(caught.value)) == (not lacking[rank])
        for i, p in enumerate(ps):
            assert i in lacking[rank] or torch.equal(p.grad.to_local(), grads[i].to_local())
    everywhere = [parameter(None, like=grads[0]), parameter(grads[1]), parameter(grads[2])]
    everywhere[2].grad = None if rank == 3 else grads[2]
    assert torchclip.clip_grad_norm_(everywhere, INF) > torchclip.get_total_norm(fulls[1])
    model = nn.ParameterDict({"weight": parameter(grads[0] if rank else None, like=grads[0])})
    whose = "'weight' of shape" if rank == 0 else "others lack"
    with pytest.raises(RuntimeError, match=whose):
        torchclip.clip_grad_norm_(model, 0.1)


def check_replicas_that_differ_within_a_group() -> None:
    """Stages of a pipeline, each with its own replicas, on which nothing is split."""
    rank = dist.get_rank()
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    fulls = [randn(8, 5), randn(8, 5, seed=1)]
    grad = split(fulls[rank // 2], grid["dp"], Replicate())
    p = parameter(grad if rank % 2 else None, like=grad)
    with pytest.raises(RuntimeError, match="replicas of the same parameters"):
        torchclip.clip_grad_norm_([p], INF, group=dist.group.WORLD)
    p.grad = grad
    for group in (grid.get_group("pp"), dist.group.WORLD):
        norm = torchclip.clip_grad_norm_([p], INF, group=group)
        assert_agreed(norm)
        assert norm == torchclip.get_total_norm(fulls)


def check_replicas_that_differ_on_an_accelerator() -> None:
    """The norm is NaN, and the next call raises."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    grads = [split(randn(8, 5, seed=i), mesh, Replicate(), Shard(0)) for i in range(2)]
    ps = [parameter(grads[0]), parameter(None if rank == 2 else grads[1], like=grads[1])]
    with pytest.MonkeyPatch.context() as patch:
        as_on_an_accelerator(patch)
        assert torchclip.clip_grad_norm_(ps, INF).isnan()
        with pytest.raises(RuntimeError, match="parameter 1 of shape" if rank == 2 else "others lack"):
            torchclip.get_total_norm(grads)
        assert torchclip.get_total_norm(grads) == torchclip.get_total_norm([randn(8, 5), randn(8, 5, seed=1)])


@world_of(5)
def check_replicas_of_some_ranks_agree() -> None:
    """On a mesh of some ranks, of two dimensions."""
    rank, group = dist.get_rank(), dist.new_group([0, 1, 2, 3])
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]])
    if rank == 4:
        return
    # Replicas that differ slightly, as after sums in another order.
    grad = split(randn(8, 5) * (1 + rank // 2 * 2e-7), mesh, Replicate(), Shard(0))
    for order in (0, 1, 2, 3, INF, -1):
        norm = torchclip.get_total_norm([grad], order)
        assert_agreed(norm, group)
        assert norm == torchclip.get_total_norm(randn(8, 5), order)


def check_groups_that_cross_a_mesh_at_odds_with_their_grid() -> None:
    rank = dist.get_rank()
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    crossing = [grid.get_group("a"), grid.get_group("b")]
    odd = [dist.new_group([0, 3]), dist.new_group([1, 2])]
    fulls = [randn(8, 5) * 40, randn(8, 5, seed=1)]
    mine = 0 if rank in (0, 3) else 1
    grad = split(fulls[mine], DeviceMesh.from_group(odd[mine], "cpu"), Shard(0))
    common = split(randn(6, seed=3), init_device_mesh("cpu", (4,)), Replicate())
    own = torch.full((2,), 1.0 + rank)
    for groups in (crossing, crossing[::-1], dist.group.WORLD):
        norm = torchclip.get_total_norm([grad, own, common], group=groups)
        assert_agreed(norm)
        whole = [*fulls, *(torch.full((2,), 1.0 + r) for r in range(4)), randn(6, seed=3)]
        assert norm == torchclip.get_total_norm(whole)
    not_crossing = [dist.new_group([0, 1]), dist.new_group([0, 1])]
    if rank < 2:
        with pytest.raises(ValueError, match="must cross each other"):
            torchclip.get_total_norm([own], group=not_crossing)


def check_a_dispatch_mode_on_one_rank() -> None:
    """Such as a FLOP counter on the rank that writes the log."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (4,))
    for seed in range(5):
        full = randn(9, 7, dtype=torch.float64, seed=seed)
        grads = [
            split(full, mesh, Shard(0)),
            split(full * 3, mesh, Shard(1)),
            split(full / 7, mesh, Replicate()),
        ]
        for order in (1, 2, 3, INF):
            if rank == 1:
                with FlopCounterMode(display=False):
                    norm = torchclip.get_total_norm(grads[:2], order)
            else:
                norm = torchclip.get_total_norm(grads[:2], order)
            assert_agreed(norm)
