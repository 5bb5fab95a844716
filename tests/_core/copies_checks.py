"""Checks that copies on several ranks count once, and are treated alike on all of them."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dtensors import assert_agreed, parameter, split
from helpers import bits, last_of, randn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils.flop_counter import FlopCounterMode

import torchclip
from torchclip._core import messages

INF = math.inf
ORDERS = (0, 1, 2, 3, INF, -1)
# The ways of few ranks and of many.
EITHER_WAY = (16, 2)


def check_gradients_that_the_first_replica_lacks() -> None:
    """Gradients of other replicas count, also if each replica lacks a different one."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    fulls = [randn(8, 5, seed=i) for i in range(6)]
    ways = [(Replicate(), Shard(0))] * 3 + [(Shard(1), Replicate())] * 2 + [(Shard(0), Shard(1))]
    grads = [split(full, mesh, *way) for full, way in zip(fulls, ways, strict=True)]
    expected: dict[float, list[float]] = {
        order: [torchclip.get_total_norm(full, order).item() for full in fulls] for order in ORDERS
    }
    first_replica: list[list[int]] = [[0], [0], [], []]
    in_turns: list[list[int]] = [[0, 3], [0], [1], [1, 4]]
    nowhere: list[list[int]] = [[]] * 4
    for lacking in (nowhere, first_replica, in_turns):
        for many in EITHER_WAY:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(messages, "MANY_ON_HOST", many)
                for order in ORDERS:
                    ps = [parameter(None if i in lacking[rank] else g, like=g) for i, g in enumerate(grads)]
                    norm = torchclip.clip_grad_norm_(ps, INF, order)
                    assert_agreed(norm)
                    assert norm == torchclip.get_total_norm(fulls, order)
                    each = torchclip.clip_grad_norm_per_parameter_(ps, INF, order)
                    there = [i for i in range(6) if i not in lacking[rank]]
                    assert each.tolist() == [expected[order][i] for i in there]
    lone = parameter(grads[0] if rank >= 2 else None, like=grads[0])
    assert torchclip.clip_grad_norm_([lone], 0.5) == torchclip.get_total_norm(fulls[0])
    if rank >= 2:
        assert float(lone.grad.full_tensor().norm()) == pytest.approx(0.5, rel=1e-5)


def check_replicas_that_lack_gradients_within_a_group() -> None:
    """Stages of a pipeline, each with its own replicas."""
    rank = dist.get_rank()
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    fulls = [randn(8, 5), randn(8, 5, seed=1)]
    grad = split(fulls[rank // 2], grid["dp"], Replicate())
    p = parameter(grad if rank % 2 else None, like=grad)
    for group in (grid.get_group("pp"), dist.group.WORLD):
        norm = torchclip.clip_grad_norm_([p], INF, group=group)
        assert_agreed(norm)
        assert norm == torchclip.get_total_norm(fulls)


def check_replicas_that_lack_gradients_within_a_group_beside_a_mesh_of_all() -> None:
    """The comparison needs no exchange with ranks outside the group."""
    rank = dist.get_rank()
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    common, copy = randn(8, 5), randn(6, seed=1)
    p = parameter(split(copy, grid["dp"], Replicate()))
    if rank == 3:  # the other two have their copies
        p.grad = None
    for order in (1, 2, INF):
        norm = torchclip.get_total_norm([common, copy], order)
        everywhere = parameter(split(common, grid, Shard(0), Shard(1)))
        assert torchclip.clip_grad_norm_([everywhere, p], INF, order, group=grid.get_group("dp")) == norm


def check_replicas_of_some_ranks_decide_alike() -> None:
    """On a mesh of some ranks, of two dimensions: the dtype, the way to multiply, and the norm."""
    rank = dist.get_rank()
    root = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("pp", "replicate", "shard"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchclip._core.mesh, "groups_over", _one_a_dimension)
        mesh = root["replicate", "shard"]
        narrow = split(randn(8, 5), mesh, Replicate(), Shard(0))
        wide = split(randn(8, 5, dtype=torch.float64), mesh, Replicate(), Shard(0))
        lacking = [parameter(wide if rank == 1 else None, like=wide), parameter(narrow)]
        norm = torchclip.clip_grad_norm_(lacking, 0.5)
        assert norm.dtype == torch.float64
        assert_agreed(norm)
        # Copies that differ slightly, as after sums in another order.
        grad = split(randn(8, 5) * (1 + rank // 2 * 2e-7), mesh, Replicate(), Shard(0))
        assert_agreed(torchclip.get_total_norm([grad]))
        # The gradient of one rank has gaps, which a fused step would write into.
        held = torch.ones(1_200_000)[::2] if rank == 3 else torch.ones(600_000)
        common = parameter(split(randn(31, 17), mesh, Replicate(), Shard(0)))
        own = parameter(split(torch.ones(1_200_000), mesh, Replicate(), Shard(0)))
        own.grad = DTensor.from_local(held, mesh, [Replicate(), Shard(0)])
        optimizer = torch.optim.AdamW([common, own], lr=0.1, fused=True)
        clipper = torchclip.Clipper(optimizer, 0.123)
        optimizer.step()
        assert last_of(clipper).clipped
        copies: list[Any] = [None] * 4
        dist.all_gather_object(copies, bits(common.detach().to_local()))
        assert (copies[0], copies[1]) == (copies[2], copies[3])


def _one_a_dimension(mesh: DeviceMesh) -> list[dist.ProcessGroup]:
    return [mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1]


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
    for seed in range(20):
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


def check_copies_that_a_group_counts_several_times() -> None:
    """If `group` has all ranks, but parameters of one mesh are copies of those of another."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    full = randn(8, 5)
    grads = [split(full, grid["tp"], Shard(0)), split(randn(3, seed=1), grid["tp"], Replicate())]
    assert torchclip.get_total_norm(grads) == torchclip.get_total_norm([full, randn(3, seed=1)])
    for some in (grads, grads[:1]):
        with pytest.warns(UserWarning, match="copies of the same gradients") as caught:
            torchclip.get_total_norm(some, group=dist.group.WORLD)
        assert caught[0].filename == __file__
    stages = [split(randn(8, 5, seed=dist.get_rank() // 2), grid["tp"], Shard(0))]
    torchclip.get_total_norm(stages, group=dist.group.WORLD)
