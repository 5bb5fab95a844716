"""Checks of gradients on several meshes, of groups, and of gradients that some ranks lack."""

import itertools
import math

import torch
import torch.distributed as dist
from dtensors import assert_agreed, assert_same, compare, global_norm, parameter, split
from helpers import NORM_TYPES, randn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import torchclip

INF = math.inf


def check_gradients_that_some_ranks_lack() -> None:
    rank = dist.get_rank()
    mesh, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    some = {0: [1], 1: [0, 2], 2: [0, 1, 2, 3], 3: []}
    only_one_has_any = {0: [0, 1, 2, 3], 1: [0, 1, 2, 3], 2: [3], 3: [0, 1, 2, 3]}
    for order, lacking in itertools.product((0, 2, INF, -1), (some, only_one_has_any)):
        fulls = [randn(8, 5, seed=i) for i in range(4)]
        grads = [split(f, mesh, Shard(0)) for f in fulls[:3]] + [split(fulls[3], grid, Shard(0), Shard(1))]
        parameters = [parameter(None if i in lacking[rank] else g, like=g) for i, g in enumerate(grads)]
        # By rows of 2: a rank has as many of the first three.
        rows = [slice(2 * r, 2 * r + 2) for r in range(4)]
        there = [fulls[i][rows[r]] for r in range(4) for i in range(3) if i not in lacking[r]]
        there += [fulls[3][4 * (r // 2) :][:4].chunk(2, 1)[r % 2] for r in range(4) if 3 not in lacking[r]]
        norm = torchclip.clip_grad_norm_(parameters, 1.0, order, error_if_nonfinite=True)
        assert_agreed(norm)
        assert norm == torchclip.get_total_norm([t.contiguous() for t in there], order)
        norms = torchclip.clip_grad_norm_per_parameter_(parameters, INF)
        assert len(norms) == 4 - len(lacking[rank])
        torchclip.clip_grad_adaptive_(parameters[:3])


def check_experts_on_meshes_that_only_some_ranks_have() -> None:
    """One mesh for all, one for each pair of ranks with its own expert; ``group`` says that they differ."""
    rank = dist.get_rank()
    everyone = init_device_mesh("cpu", (4,))
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    crossing = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    pair = DeviceMesh.from_group(pairs[rank // 2], "cpu")
    fulls = [randn(8, 5), randn(6, 3, seed=1), randn(6, 3, seed=2)]
    expert = fulls[1 + rank // 2]
    for order, experts_first in itertools.product((0, 1, 2, INF, -INF), (False, True)):
        grads = [split(fulls[0], everyone, Shard(0)), split(expert, pair, Shard(0))]
        if experts_first:
            grads.reverse()
        own = torchclip.get_total_norm(grads, order)
        assert_agreed(own, pairs[rank // 2])
        assert own == torchclip.get_total_norm([fulls[0], expert], order)
        for group in (dist.group.WORLD, crossing[rank % 2]):
            norm = torchclip.clip_grad_norm_([parameter(g.clone()) for g in grads], 0.5, order, group=group)
            assert_agreed(norm)
            assert norm == torchclip.get_total_norm(fulls, order)


def check_expert_parallel_over_submeshes() -> None:
    """Dense parameters over all ranks; experts split over ``ep`` and, within it, over ``shard``."""
    root = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "ep"))
    dense = init_device_mesh("cpu", (4,))
    fulls = [randn(9, 5), randn(4, 6, 3, seed=1), randn(4, seed=2), randn(3, 3, seed=3)]
    grads = [
        split(fulls[0], dense, Shard(0)),
        split(fulls[1], root, Shard(1), Shard(0)),
        split(fulls[2], root["ep"], Shard(0)),
        split(fulls[3], root["shard"], Replicate()),
    ]
    for arrangement in itertools.permutations(range(4)):
        arranged = [grads[i].clone() for i in arrangement]
        compare([fulls[i] for i in arrangement], arranged, global_norm(0.5))
    for order in (0, INF, -INF):
        compare(fulls, [grad.clone() for grad in grads], global_norm(0.5, order))
    compare(fulls, grads, lambda ps: torchclip.clip_grad_norm_per_parameter_(ps, 0.5))


def check_asymmetric_submeshes() -> None:
    """Ranks meet the dimensions of their mesh in different orders."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    fulls = [randn(6, seed=1), randn(6, 4)]
    grads = [split(fulls[0], grid["b"], Shard(0))] if dist.get_rank() < 2 else []
    grads.append(split(fulls[1], grid, Shard(0), Shard(1)))
    norms = torchclip.clip_grad_norm_per_parameter_([parameter(g) for g in grads], INF)
    assert norms[-1] == torchclip.get_total_norm(fulls[1])


def check_parts_made_by_hand() -> None:
    """Plain tensors over one group of ranks, over two that cross, and a rank without parameters.

    Gradients that all ranks of the group share count once.
    """
    rank = dist.get_rank()
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    fulls = [*(randn(5, 2, seed=i) for i in range(4)), randn(9, 3)]
    crossing = [grid.get_group("a"), grid.get_group("b")]
    for order, group in itertools.product(NORM_TYPES, (dist.group.WORLD, crossing)):
        own, common = fulls[rank].clone(), split(fulls[4], init_device_mesh("cpu", (4,)), Shard(0))
        for count, grads in ((4, [own.clone()]), (5, [own, common])):
            oracle = [parameter(f.clone()) for f in fulls[:count]]
            norm = torchclip.clip_grad_norm_([parameter(g) for g in grads], 0.5, order, group=group)
            assert_agreed(norm)
            assert norm == torchclip.clip_grad_norm_(oracle, 0.5, order)
            assert_same(grads[0], oracle[rank].grad)
        without_me = [] if rank == 1 else [fulls[rank]]
        norm = torchclip.get_total_norm(without_me, order, group=group)
        assert_agreed(norm)
        assert norm == torchclip.get_total_norm([f for r, f in enumerate(fulls[:4]) if r != 1], order)


def check_ranks_agree_on_the_dtype() -> None:
    """One gradient in float64 on one rank makes the norm float64 on all."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    crossing = [grid.get_group("a"), grid.get_group("b")]
    for group in (dist.group.WORLD, crossing):
        grad = randn(5, dtype=torch.float64 if rank == 2 else torch.float32, seed=rank)
        norm = torchclip.clip_grad_norm_([parameter(grad)], 0.5, group=group)
        assert norm.dtype == torch.float64
        assert_agreed(norm)
    for lies in ((mesh, Shard(0)), (grid, Shard(0), Shard(1))):
        wide = split(randn(8, 4, dtype=torch.float64), *lies)
        narrow = split(randn(8, 4), *lies)
        lacking = [parameter(wide if rank == 1 else None, like=wide), parameter(narrow)]
        norm = torchclip.clip_grad_norm_(lacking, 0.5)
        assert norm.dtype == torch.float64
        assert_agreed(norm)
        norms = torchclip.clip_grad_norm_per_parameter_(lacking, 0.5)
        assert norms.dtype == torch.float64
        norm = torchclip.clip_grad_norm_([parameter(None, like=wide), parameter(narrow)], 0.5)
        assert norm.dtype == torch.float32
        assert_agreed(norm)
