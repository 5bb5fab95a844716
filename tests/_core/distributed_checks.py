"""Checks that all ranks run together, against the plain functions on the full tensors."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_helpers import TORCH, since_2_7, world_of
from dtensors import assert_agreed, collectives_of, parameter, split
from helpers import DTYPES, NORM_TYPES, grad_of, last_of, randn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

import torchclip
from torchclip.cli.run.calls import Calls
from torchclip.cli.run.functions import FunctionRecorder
from torchclip.cli.run.trial import Trial
from torchclip.clipper import Nonfinite, Scope
from torchclip.thresholds import MaxNorm

INF = math.inf
# Uneven over 2 and 4 ranks, with fewer rows than ranks, with none, and without an axis.
SHAPES = [(10, 6), (3, 5), (7,), (1,), (2, 1, 3), (0, 4), (16, 4)]
SCOPES: list[Scope] = ["global", "group", "parameter"]
POLICIES: list[Nonfinite] = ["propagate", "skip", "zero"]


def addends(full: Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    """A DTensor that has this value once the ranks' addends are reduced."""
    where = [Replicate() if p.is_partial() else p for p in placements]
    held = split(full, mesh, *where).to_local().clone()
    for dim, placement in enumerate(placements):
        if isinstance(placement, Partial):
            # Powers of two: exact in every dtype.
            ranks, place = mesh.size(dim), mesh.get_local_rank(dim)
            shares = [2.0**-i for i in range(1, ranks)] + [2.0 ** (1 - ranks)]
            held = held * (shares[place] * (ranks if placement.reduce_op == "avg" else 1))
    return DTensor.from_local(held, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(actual: Tensor, expected: Tensor) -> None:
    # The product with the coefficient is rounded once, that of each addend too: the last digit may differ.
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


def placements_on(mesh: DeviceMesh, shape: tuple[int, ...]) -> list[tuple[Placement, ...]]:
    """All ways in which a tensor can lie on a mesh."""
    each = [Replicate(), *(Shard(d) for d in range(len(shape)))]
    ways = list(itertools.product(each, repeat=mesh.ndim))
    return [*ways, *strided(mesh, shape)]


def strided(mesh: DeviceMesh, shape: tuple[int, ...]) -> list[tuple[Placement, ...]]:
    """The way in which FSDP2 over tensor parallelism splits rows; torch 2.9 mixes up uneven ones itself."""
    if mesh.ndim != 2 or not shape or (TORCH < (2, 10) and shape[0] % mesh.size()):
        return []
    return [(_StridedShard(0, split_factor=mesh.size(1)), Shard(0))]


def check_every_placement_on_a_line_of_ranks() -> None:
    mesh = init_device_mesh("cpu", (4,))
    fulls, grads = [], []
    for i, shape in enumerate(SHAPES):
        for way in placements_on(mesh, shape):
            fulls.append(randn(*shape, seed=i))
            grads.append(split(fulls[-1], mesh, *way))
    for limit in (1.0, 1e6):
        compare(fulls, [g.clone() for g in grads], global_norm(limit))


def check_every_placement_on_a_grid_of_ranks() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    for i, shape in enumerate(SHAPES):
        fulls, grads = [], []
        for way in placements_on(mesh, shape):
            fulls.append(randn(*shape, seed=i))
            grads.append(split(fulls[-1], mesh, *way))
            # One by one, as a mistake in one may be made good by another.
            assert_agreed(torchclip.get_total_norm(grads[-1]))
            assert torchclip.get_total_norm(grads[-1]) == torchclip.get_total_norm(fulls[-1])
        compare(fulls, grads, global_norm(1.0))


def check_norm_types() -> None:
    mesh = init_device_mesh("cpu", (4,))
    fulls = [randn(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    fulls[0][3, 2] = 0
    for order, clip in itertools.product(NORM_TYPES, (global_norm, with_norm)):
        compare(fulls, [split(f, mesh, Shard(0)) for f in fulls], clip(0.5, order))


def check_norm_types_without_any_element() -> None:
    mesh = init_device_mesh("cpu", (4,))
    for order in NORM_TYPES:
        for grads in ([], [split(torch.zeros(0, 4), mesh, Shard(0))]):
            assert torchclip.get_total_norm(grads, order) == 0
        assert torchclip.get_total_norm([], order, group=dist.group.WORLD) == 0


@since_2_7
def check_dtypes() -> None:
    grid = init_device_mesh("cpu", (2, 2))
    for dtype in DTYPES:
        fulls = [randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(SHAPES)]
        compare(fulls, [split(f, grid, Shard(0), Replicate()) for f in fulls], global_norm(1.0))
        split_twice = [(full, way) for full in fulls for way in strided(grid, tuple(full.shape))]
        compare(
            [full for full, _ in split_twice],
            [split(full, grid, *way) for full, way in split_twice],
            global_norm(1.0),
        )
    mixed = [randn(5, 2, dtype=dtype, seed=i) for i, dtype in enumerate(DTYPES)]
    compare(mixed, [split(f, grid, Shard(0), Shard(1)) for f in mixed], global_norm(1.0))


def check_range() -> None:
    """Norms whose squares leave float64."""
    mesh = init_device_mesh("cpu", (4,))
    for scale in (1e200, 1e-200):
        full = randn(9, 4, dtype=torch.float64) * scale
        compare([full], [split(full, mesh, Shard(0))], global_norm(scale))


@since_2_7
def check_pending_sums_and_averages() -> None:
    grid = init_device_mesh("cpu", (2, 2))
    ways = [
        (Partial(), Replicate()),
        (Shard(0), Partial()),
        (Partial("avg"), Shard(1)),
        (Partial(), Partial()),
        (Shard(0), Replicate()),
    ]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.complex64):
        fulls = [randn(6, 5, dtype=dtype, seed=i) for i in range(len(ways))]
        grads = [addends(f, grid, *way) for f, way in zip(fulls, ways, strict=True)]
        compare(fulls, [g.clone() for g in grads], global_norm(1.0))
        compare(
            fulls, [g.clone() for g in grads], lambda ps: torchclip.clip_grad_norm_per_parameter_(ps, 1.0)
        )
        assert all(g.placements == way for g, way in zip(grads, ways, strict=True))


def check_pending_sums_are_not_clamped() -> None:
    mesh = init_device_mesh("cpu", (4,))
    p = parameter(addends(randn(6, 5), mesh, Partial()))
    before = p.grad.to_local().clone()
    with pytest.raises(TypeError, match=r"gradient 0 of shape \(6, 5\).*pending.*redistribute"):
        torchclip.clip_grad_value_([p], 0.1)
    assert torch.equal(p.grad.to_local(), before)


def check_value() -> None:
    grid = init_device_mesh("cpu", (2, 2))
    for dtype in (torch.float32, torch.bfloat16):
        fulls = [randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(SHAPES)]
        grads = [split(f, grid, Replicate(), Shard(0)) for f in fulls]
        compare(fulls, grads, lambda ps: torchclip.clip_grad_value_(ps, 0.5))


def check_norm_and_rms_per_parameter() -> None:
    grid = init_device_mesh("cpu", (2, 2))
    by_norm = [
        functools.partial(torchclip.clip_grad_norm_per_parameter_, max_norm=0.5, norm_type=order)
        for order in NORM_TYPES
    ]
    for clip in [*by_norm, functools.partial(torchclip.clip_grad_rms_, max_rms=0.5)]:
        fulls: list[Tensor] = []
        grads: list[Tensor] = []
        for i, shape in enumerate(SHAPES):
            for way in placements_on(grid, shape)[:6]:
                fulls.append(randn(*shape, seed=i))
                grads.append(split(fulls[-1], grid, *way))
        plain = randn(4)
        fulls.append(plain)
        grads.append(plain.clone())
        compare(fulls, grads, clip)


def check_adaptive() -> None:
    grid = init_device_mesh("cpu", (2, 2))
    ways = [(shape, way) for shape in SHAPES for way in placements_on(grid, shape)]
    for order in (1, 2, 3, INF, -1):
        oracles, parameters = [], []
        for shape, way in ways:
            full, weight = randn(*shape), randn(*shape, seed=7, scale=0.1)
            oracles.append(nn.Parameter(weight.clone()))
            oracles[-1].grad = full.clone()
            parameters.append(nn.Parameter(split(weight, grid, *way)))
            parameters[-1].grad = split(full, grid, *way)
        for each in (oracles, parameters):
            torchclip.clip_grad_adaptive_(each, 0.1, norm_type=order)
        for p, oracle in zip(parameters, oracles, strict=True):
            assert_same(grad_of(p), grad_of(oracle))


def check_adaptive_with_pending_sums() -> None:
    mesh = init_device_mesh("cpu", (4,))
    full, weight = randn(6, 5), randn(6, 5, seed=7, scale=0.1)
    oracle, p = nn.Parameter(weight.clone()), nn.Parameter(split(weight, mesh, Replicate()))
    oracle.grad, p.grad = full.clone(), addends(full, mesh, Partial())
    for each in (oracle, p):
        torchclip.clip_grad_adaptive_([each], 0.1)
    assert_same(p.grad, oracle.grad)


def check_adaptive_needs_gradients_split_as_weights() -> None:
    mesh = init_device_mesh("cpu", (4,))
    p = nn.Parameter(split(randn(8, 8), mesh, Shard(0)))
    p.grad = split(randn(8, 8), mesh, Shard(1))
    with pytest.raises(TypeError, match=r"not split as its parameter.*redistribute"):
        torchclip.clip_grad_adaptive_([p])


def check_beside_plain_tensors() -> None:
    mesh = init_device_mesh("cpu", (4,))
    fulls = [randn(6, 5), randn(3, seed=1)]
    compare(fulls, [split(fulls[0], mesh, Shard(0)), fulls[1].clone()], global_norm(1.0))
    compare(fulls, [split(fulls[0], mesh, Replicate()), fulls[1].clone()], global_norm(1.0))


def check_limits_and_norms_that_are_pending() -> None:
    mesh = init_device_mesh("cpu", (4,))
    full = randn(8, 5)
    norm = torch.linalg.vector_norm(split(full, mesh, Shard(0)))  # on each rank, that of its part
    assert norm.placements[0].is_partial()
    compare([full], [split(full, mesh, Shard(0))], lambda ps: torchclip.clip_grads_with_norm_(ps, 0.5, norm))
    p = parameter(split(full, mesh, Shard(0)))
    torchclip.clip_grad_norm_(p, norm / 2)
    torch.testing.assert_close(whole(p.grad), full / 2)


def check_shared_gradients_and_parameters_listed_twice() -> None:
    mesh = init_device_mesh("cpu", (4,))
    full = randn(6, 5)
    a, b = parameter(full.clone()), parameter(split(full, mesh, Shard(0)))
    expected, actual = (torchclip.clip_grad_norm_([p, p], 1.0) for p in (a, b))
    assert actual == expected
    assert_same(b.grad, a.grad)
    c = parameter(None, like=b.grad)
    c.grad = b.grad
    assert len(torchclip.clip_grad_norm_per_parameter_([b, c], 0.5)) == 1


def check_gradients_that_some_ranks_lack() -> None:
    rank = dist.get_rank()
    mesh, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    for order in (0, 2, INF, -1):
        fulls = [randn(8, 5, seed=i) for i in range(4)]
        grads = [split(f, mesh, Shard(0)) for f in fulls[:3]] + [split(fulls[3], grid, Shard(0), Shard(1))]
        lacking = {0: [1], 1: [0, 2], 2: [0, 1, 2, 3], 3: []}
        parameters = [parameter(None if i in lacking[rank] else g, like=g) for i, g in enumerate(grads)]
        # By rows of 2, which is what a rank has of the first three.
        rows = [slice(2 * r, 2 * r + 2) for r in range(4)]
        there = [fulls[i][rows[r]] for r in range(4) for i in range(3) if i not in lacking[r]]
        there += [fulls[3][4 * (r // 2) :][:4].chunk(2, 1)[r % 2] for r in range(4) if 3 not in lacking[r]]
        norm = torchclip.clip_grad_norm_(parameters, 1.0, order)
        assert_agreed(norm)
        assert norm == torchclip.get_total_norm([t.contiguous() for t in there], order)
        norms = torchclip.clip_grad_norm_per_parameter_(parameters, INF)
        assert len(norms) == 4 - len(lacking[rank])
        torchclip.clip_grad_adaptive_(parameters)


def check_gradients_that_a_rank_has_none_of() -> None:
    mesh = init_device_mesh("cpu", (4,))
    p = parameter(None, like=split(randn(8, 5), mesh, Shard(0)))
    if dist.get_rank() == 2:
        p.grad = split(randn(8, 5), mesh, Shard(0))
    norm = torchclip.clip_grad_norm_([p], 1.0, error_if_nonfinite=True)
    assert_agreed(norm)
    assert norm == torchclip.get_total_norm(randn(8, 5)[4:6].contiguous())


def check_experts_on_meshes_that_only_some_ranks_have() -> None:
    """One mesh for all, one for each pair of ranks with an expert of its own; ``group`` tells them apart."""
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


def check_experts_that_some_ranks_lack() -> None:
    rank = dist.get_rank()
    everyone = init_device_mesh("cpu", (4,))
    group = dist.new_group([0, 1])
    fulls = [randn(8, 5), randn(6, 3, seed=1)]
    grads = [split(fulls[0], everyone, Shard(0))]
    if rank < 2:
        grads.append(split(fulls[1], DeviceMesh.from_group(group, "cpu"), Shard(0)))
    expected = [torchclip.get_total_norm(f) for f in fulls[: len(grads)]]
    assert torchclip.get_total_norm(grads) == torchclip.get_total_norm(fulls[: len(grads)])
    norm = torchclip.get_total_norm(grads, group=dist.group.WORLD)
    assert_agreed(norm)
    assert norm == torchclip.get_total_norm(fulls)
    each = torchclip.clip_grad_norm_per_parameter_([parameter(g) for g in grads], INF)
    assert each.tolist() == [norm.item() for norm in expected]


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


def check_meshes_without_all_ranks() -> None:
    group = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        mesh = DeviceMesh.from_group(group, "cpu")
        full = randn(7, 3)
        norm = torchclip.clip_grad_norm_([parameter(split(full, mesh, Shard(0)))], 1.0)
        assert norm == torchclip.get_total_norm(full)


def check_pipeline() -> None:
    """Stages over which parameters are parted, each of them sharded by itself."""
    root = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    fulls = [randn(7, 5), randn(3, 4, seed=1), randn(4, seed=2), randn(2, seed=3)]
    stage = root.get_local_rank("pp")
    mine = fulls[2 * stage : 2 * stage + 2]
    for order, group in itertools.product(NORM_TYPES, (root.get_group("pp"), dist.group.WORLD)):
        ways = (Shard(0), Replicate())
        p = [parameter(split(f, root["dp"], way)) for f, way in zip(mine, ways, strict=True)]
        oracle = [parameter(f.clone()) for f in fulls]
        norm = torchclip.clip_grad_norm_(p, 0.5, order, group=group)
        assert_agreed(norm)
        assert norm == torchclip.clip_grad_norm_(oracle, 0.5, order)
        for each, expected in zip(p, oracle[2 * stage : 2 * stage + 2], strict=True):
            assert_same(each.grad, expected.grad)


def check_parts_made_by_hand() -> None:
    """Plain tensors over one group of ranks, over two that cross, and a rank without parameters."""
    rank = dist.get_rank()
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    fulls = [randn(5, 2, seed=i) for i in range(4)]
    crossing = [grid.get_group("a"), grid.get_group("b")]
    for order, group in itertools.product(NORM_TYPES, (dist.group.WORLD, crossing)):
        p = parameter(fulls[rank].clone())
        oracle = [parameter(f.clone()) for f in fulls]
        norm = torchclip.clip_grad_norm_([p], 0.5, order, group=group)
        assert_agreed(norm)
        assert norm == torchclip.clip_grad_norm_(oracle, 0.5, order)
        assert_same(p.grad, oracle[rank].grad)
        without_me = [] if rank == 1 else [fulls[rank]]
        norm = torchclip.get_total_norm(without_me, order, group=group)
        assert_agreed(norm)
        assert norm == torchclip.get_total_norm([f for r, f in enumerate(fulls) if r != 1], order)


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


def check_ranks_decide_alike_whether_a_fused_step_multiplies() -> None:
    """What they have in common must not drift apart because of what each has for itself."""
    mesh = init_device_mesh("cpu", (4,))
    # The gradient of one rank has gaps, which a fused step would write into.
    held = torch.ones(1_200_000)[::2] if dist.get_rank() == 3 else torch.ones(600_000)
    own = parameter(split(torch.ones(2_400_000), mesh, Shard(0)))
    own.grad = DTensor.from_local(held, mesh, [Shard(0)])
    common = parameter(split(randn(31, 17), mesh, Replicate()))
    optimizer = torch.optim.AdamW([common, own], lr=0.1, fused=True)
    clipper = torchclip.Clipper(optimizer, 0.123)
    optimizer.step()
    assert last_of(clipper).clipped
    assert_agreed(common.detach().to_local())
    assert_agreed(common.grad.to_local())


def check_parts_made_by_hand_beside_a_mesh_of_all() -> None:
    """What all ranks of the group have in common counts once."""
    mesh = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    fulls = [randn(5, 2, seed=i) for i in range(4)]
    common = randn(9, 3)
    crossing = [grid.get_group("a"), grid.get_group("b")]
    for group in (dist.group.WORLD, crossing):
        grads = [fulls[dist.get_rank()].clone(), split(common, mesh, Shard(0))]
        norm = torchclip.clip_grad_norm_([parameter(g) for g in grads], 0.5, group=group)
        assert_agreed(norm)
        assert norm == torchclip.get_total_norm([common, *fulls])


def check_groups_are_process_groups() -> None:
    groups: list[Any] = ["world", [dist.group.WORLD, 1], dist.GroupMember.NON_GROUP_MEMBER]
    for wrong in groups:
        with pytest.raises(TypeError, match="`group` must be a process group"):
            torchclip.get_total_norm([], group=wrong)


def check_nonfinite_on_one_rank() -> None:
    mesh = init_device_mesh("cpu", (4,))
    for bad in (math.nan, INF):
        full = randn(8, 3)
        full[5, 1] = bad
        grad = split(full, mesh, Shard(0))
        before = grad.to_local().clone()
        blamed = "gradient 0 of shape" if dist.get_rank() == 2 else "none of this rank's"
        calls: list[Callable[[DTensor], Tensor]] = [
            lambda g: torchclip.clip_grad_norm_([parameter(g)], 1.0, error_if_nonfinite=True),
            lambda g: torchclip.get_total_norm([g], error_if_nonfinite=True),
            lambda g: torchclip.clip_grad_norm_(
                [parameter(g.to_local())], 1.0, error_if_nonfinite=True, group=dist.group.WORLD
            ),
        ]
        for call in calls:
            with pytest.raises(RuntimeError, match=f"non-finite.*{blamed}"):
                call(grad)
        assert torch.equal(grad.to_local().nan_to_num(), before.nan_to_num())
        compare([full], [grad], global_norm(1.0))


@world_of(2)
def check_norms_under_install_are_what_code_for_torch_expects() -> None:
    fulls = [randn(10, 6), randn(3, 5, seed=1)]
    expected = torchclip.get_total_norm(fulls)
    meshes = [init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))]
    for mesh, placements in itertools.product(meshes, ((Shard(0),), (Replicate(),))):
        where = [*placements, Replicate()][: mesh.ndim]
        parameters = [parameter(split(full, mesh, *where)) for full in fulls]
        grads = [p.grad for p in parameters]
        with torchclip.installed():
            for norm in (
                torch.nn.utils.clip_grad_norm_(parameters, INF),
                torch.nn.utils.get_total_norm(grads),
                torch.nn.utils.get_total_norm(iter([*grads, fulls[0][:0]])),
            ):
                assert isinstance(norm, DTensor)
                assert norm.item() == float(norm) == norm.full_tensor() == expected
                assert norm.to_local() == expected
                assert type(norm.full_tensor()) is Tensor
            torch.nn.utils.clip_grads_with_norm_(parameters, 0.5, norm)
            clipped = torch.nn.utils.clip_grad_norm_(parameters, 0.25)
            assert clipped.item() == pytest.approx(0.5, rel=1e-5)
            # What has no DTensors is as ever.
            assert type(torch.nn.utils.get_total_norm(fulls)) is Tensor
        assert type(torchclip.get_total_norm(grads)) is Tensor
        for p, full in zip(parameters, fulls, strict=True):
            torch.testing.assert_close(whole(p.grad), full * 0.25 / expected, rtol=1e-5, atol=1e-6)


@world_of(2)
def check_norms_of_dtensors_are_recorded_by_the_run_command() -> None:
    mesh = init_device_mesh("cpu", (2,))
    with torchclip.installed():
        recorder = FunctionRecorder(Calls(), Trial())
        recorder.attach()
        torch.nn.utils.clip_grad_norm_([parameter(split(torch.ones(4), mesh, Shard(0)))], 1.0)
    recorder.calls.finish()
    assert [(record.total_norm, record.clipped) for record in recorder.calls.stray] == [(2.0, True)]


def check_number_of_collectives_of() -> None:
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
    # One reduction more for all that is pending.
    assert count(*[addends(full, everyone, Partial()) for _ in range(3)], *sharded) == 2
    # Of what is not split over several ranks, nothing is exchanged.
    alone = init_device_mesh("cpu", (4, 1))
    assert count(split(full, alone, Replicate(), Shard(0))) == 0
    value = lambda parameters, limit: torchclip.clip_grad_value_(parameters, limit)  # noqa: E731
    assert count(*sharded, clip=value) == 0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(torch.tanh(self.up(self.norm(x))))
        return result


# Activations between the layers are split along the sequence, and so are the gradients of LayerNorm's sums.
SEQUENCE_PARALLEL = {
    "norm": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1)),
}


def parameters_of(model: nn.Module) -> list[Any]:
    """Its parameters, which pass for anything: gradients are there, and DTensors where it is sharded."""
    return list(model.parameters())


def model_of(blocks: int = 2, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(blocks))).to(dtype)


def batch_of(ranks: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(4 * ranks, 3, 6, dtype=dtype)


def backward(model: nn.Module, x: Tensor, weight: float = 100.0) -> None:
    (weight * model(x).square().mean()).backward()


def trained_alone(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Float64, so that sums over ranks in another order make no difference that counts."""
    model = model_of(dtype=dtype)
    backward(model, batch_of(4, dtype))
    return model


def compare_models(model: nn.Module, oracle: nn.Module, rtol: float = 1e-11) -> None:
    names = [name.replace("module.", "") for name, _ in model.named_parameters()]
    assert names == [name for name, _ in oracle.named_parameters()]
    expected = torchclip.clip_grad_norm_(oracle.parameters(), 0.1)
    actual = torchclip.clip_grad_norm_(model.parameters(), 0.1)
    assert_agreed(actual)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=0)
    for p, q in zip(parameters_of(model), oracle.parameters(), strict=True):
        torch.testing.assert_close(whole(p.grad), q.grad, rtol=rtol, atol=rtol)


def my_part(x: Tensor, parts: int = 4, place: int | None = None) -> Tensor:
    return x.chunk(parts)[dist.get_rank() if place is None else place]


def sharded(model: nn.Sequential, **options: Any) -> nn.Sequential:
    for block in model:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


@since_2_7
def check_fsdp2() -> None:
    model = sharded(model_of(dtype=torch.float64))
    backward(model, my_part(batch_of(4, torch.float64)))
    assert dist.get_rank() < 3 or any(p.grad.to_local().numel() == 0 for p in parameters_of(model))
    compare_models(model, trained_alone())


@since_2_7
def check_fsdp2_on_replicated_groups() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = sharded(model_of(dtype=torch.float64), mesh=mesh)
    backward(model, my_part(batch_of(4, torch.float64)))
    compare_models(model, trained_alone())


@since_2_7
@world_of(2)
def check_fsdp2_on_two_ranks() -> None:
    model = sharded(model_of(dtype=torch.float64))
    backward(model, my_part(batch_of(4, torch.float64), 2))
    compare_models(model, trained_alone())


def offloaded(model: nn.Sequential) -> nn.Sequential:
    return sharded(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


@since_2_7
@world_of(2)
def check_fsdp2_with_offload_to_the_cpu() -> None:
    model = offloaded(model_of(dtype=torch.float64))
    backward(model, my_part(batch_of(4, torch.float64), 2))
    compare_models(model, trained_alone())


@since_2_7
def check_fsdp2_in_mixed_precision() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(model_of(), mp_policy=policy)
    backward(model, my_part(batch_of(4, torch.bfloat16)))
    fulls = [whole(p.grad).clone() for p in parameters_of(model)]
    compare(fulls, [p.grad for p in parameters_of(model)], global_norm(0.1))


def check_tensor_parallel_sequence() -> None:
    """SequenceParallel leaves gradients of which each rank has an addend."""
    mesh = init_device_mesh("cpu", (4,))

    blocks: list[Any] = [model_of(1, torch.float64)[0] for _ in range(2)]
    model, oracle = blocks
    parallelize_module(model, mesh, SEQUENCE_PARALLEL)
    x = randn(4, 8, 6, dtype=torch.float64)
    backward(oracle, x)
    backward(model, x.chunk(4, dim=1)[dist.get_rank()], 100 / 4)
    assert model.norm.weight.grad.placements == (Partial(),)
    compare_models(model, oracle)
    assert model.norm.weight.grad.placements == (Partial(),)


@since_2_7
def check_fsdp2_with_tensor_parallel() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    model, oracle = (model_of(dtype=torch.float64) for _ in range(2))
    for block in model:
        parallelize_module(block, mesh["tp"], SEQUENCE_PARALLEL)
    model = sharded(model, mesh=mesh["dp"])
    x = randn(4, 8, 6, dtype=torch.float64)
    backward(oracle, x)
    part = my_part(x, 2, mesh.get_local_rank("dp")).chunk(2, dim=1)[mesh.get_local_rank("tp")]
    backward(model, part, 100 / 2)
    kinds = {type(p).__name__ for q in parameters_of(model) for p in q.grad.placements}
    assert "_StridedShard" in kinds
    grads = [p.grad for p in parameters_of(model)]
    assert len(collectives_of(lambda: torchclip.get_total_norm(grads))) == 1
    compare_models(model, oracle)


def check_ddp() -> None:
    model = nn.parallel.DistributedDataParallel(model_of(dtype=torch.float64))
    backward(model, my_part(batch_of(4, torch.float64)))
    grads = [p.grad for p in parameters_of(model)]
    assert collectives_of(lambda: torchclip.get_total_norm(grads)) == []
    compare_models(model, trained_alone())


def steps(
    model: nn.Module,
    x: Tensor,
    make_clipper: Callable[..., torchclip.Clipper],
    steps: int = 3,
    bad_step: int | None = None,
    **options: Any,
) -> tuple[list[tuple[float, float, float, bool]], list[Tensor]]:
    """Train a little; what the clipper recorded, and the parameters that came out."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    clipper = make_clipper(optimizer)
    for step in range(steps):
        backward(model, x)
        if step == bad_step:
            spoil(parameters_of(model)[0].grad)
        optimizer.step()
        optimizer.zero_grad()
    records = [(r.total_norm, r.max_norm, r.clip_coef, r.skipped) for r in clipper.history]
    return records, [whole(p).detach() for p in model.parameters()]


def spoil(grad: Tensor) -> None:
    """Put NaN into the last row, which only one rank holds."""
    if not isinstance(grad, DTensor):
        grad[-1] = math.nan
    elif dist.get_rank() == 2:
        grad.to_local()[-1] = math.nan


def compare_training(
    make_clipper: Callable[..., torchclip.Clipper],
    shard: Callable[[nn.Sequential], nn.Module] = sharded,
    dtype: torch.dtype = torch.float64,
    rtol: float = 1e-7,
    **options: Any,
) -> None:
    """Norms, thresholds and decisions are the same on all ranks, and those of one process."""
    x = batch_of(4, dtype)
    expected, weights = steps(model_of(dtype=dtype), x, make_clipper, **options)
    part = my_part(x, dist.get_world_size())
    actual, sharded_weights = steps(shard(model_of(dtype=dtype)), part, make_clipper, **options)
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, actual)
    assert all(repr(records) == repr(actual) for records in everyones)
    torch.testing.assert_close(
        torch.tensor(actual), torch.tensor(expected), rtol=rtol, atol=0, equal_nan=True
    )
    for a, b in zip(sharded_weights, weights, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, equal_nan=True)


@since_2_7
def check_clipper_on_fsdp2() -> None:
    thresholds: list[MaxNorm] = [0.1, INF, lambda step: 0.1 / (1 + step), torchclip.ZScore(warmup=2)]
    thresholds.append(torchclip.Percentile(50.0))
    for max_norm, scope in itertools.product(thresholds, SCOPES):
        compare_training(lambda o, m=max_norm, s=scope: torchclip.Clipper(o, m, scope=s))
    compare_training(lambda o: torchclip.Clipper(o, 0.1), fused=True)
    compare_training(lambda o: torchclip.Clipper(o, 0.1), foreach=True)


@since_2_7
@world_of(2)
def check_clipper_on_fsdp2_with_offload_to_the_cpu() -> None:
    def clipper(optimizer: torch.optim.Optimizer) -> torchclip.Clipper:
        return torchclip.Clipper(optimizer, 0.1)

    compare_training(clipper, offloaded)
    # A fused step gets the coefficient along with gradients in float32 only.
    compare_training(clipper, offloaded, torch.float32, 1e-3, fused=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchclip.clipper.fused._TOO_SMALL", 0)
        compare_training(clipper, offloaded, torch.float32, 1e-3, fused=True)


@since_2_7
def check_clipper_and_nonfinite_gradients_on_fsdp2() -> None:
    for nonfinite, scope in itertools.product(POLICIES, SCOPES):
        compare_training(
            lambda o, n=nonfinite, s=scope: torchclip.Clipper(o, 0.1, scope=s, nonfinite=n), bad_step=1
        )
    for scope in SCOPES:
        with pytest.raises(RuntimeError, match="non-finite"):
            compare_training(
                lambda o, s=scope: torchclip.Clipper(o, 0.1, scope=s, nonfinite="error"), bad_step=1
            )
        model = sharded(model_of())
        with pytest.raises(RuntimeError, match=r"param_groups|none of this rank's"):
            steps(
                model,
                my_part(batch_of(4)),
                lambda o, s=scope: torchclip.Clipper(o, 0.1, scope=s, nonfinite="error"),
                bad_step=1,
            )


@since_2_7
def check_clipper_with_a_fused_optimizer() -> None:
    """The coefficient goes along with the step, as the optimizer's ``grad_scale``, in float32 only."""
    results = []
    for model, x in ((model_of(), batch_of(4)), (sharded(model_of()), my_part(batch_of(4)))):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        clipper = torchclip.Clipper(optimizer, 0.1)
        backward(model, x)
        optimizer.step()
        assert last_of(clipper).clip_coef < 1
        results.append([whole(t).detach() for p in parameters_of(model) for t in (p, p.grad)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def check_clipper_over_groups() -> None:
    """Stages of a pipeline: every rank has parameters of its own."""
    rank = dist.get_rank()
    fulls = [randn(5, 2, seed=i) for i in range(4)]
    for scope, nonfinite in itertools.product(SCOPES[:2], POLICIES):
        for bad in (False, True):
            grads = [f.clone() for f in fulls]
            if bad:
                grads[2][1, 1] = math.nan
            p = parameter(grads[rank].clone())
            q = [parameter(g.clone()) for g in grads]
            ours, oracle = torch.optim.SGD([p], lr=1.0), torch.optim.SGD(q, lr=1.0)
            clipper = torchclip.Clipper(ours, 0.5, scope=scope, nonfinite=nonfinite, group=dist.group.WORLD)
            expected = torchclip.Clipper(oracle, 0.5, scope=scope, nonfinite=nonfinite)
            for each in (ours, oracle):
                each.step()
            actual, wanted = list(last_of(clipper))[:-1], list(last_of(expected))[:-1]  # without a loss
            assert actual == pytest.approx(wanted, rel=1e-12, nan_ok=True)
            assert_same(p.detach(), q[rank].detach())
    for scope in SCOPES[:2]:
        p = parameter(fulls[rank].clone())
        without_first = torch.optim.SGD([{"params": [p] if rank else []}], lr=1.0)
        clipper = torchclip.Clipper(without_first, 0.5, scope=scope, group=dist.group.WORLD)
        without_first.step()
        assert last_of(clipper).total_norm == pytest.approx(float(torchclip.get_total_norm(fulls[1:])))
    spoilt = parameter(torch.full((2,), math.nan if rank == 1 else 1.0))
    optimizer = torch.optim.SGD([spoilt], lr=1.0)
    with pytest.raises(ValueError, match="`group` has no meaning with `scope='parameter'`"):
        torchclip.Clipper(optimizer, 0.5, scope="parameter", group=dist.group.WORLD)
    torchclip.Clipper(optimizer, 0.5, nonfinite="error", group=dist.group.WORLD)
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.step()
    assert (spoilt == 0).all()


def check_versions_of_gradients_that_stay() -> None:
    """What is not changed keeps its version, as what autograd has saved of it stays valid."""
    mesh = init_device_mesh("cpu", (4,))
    grads = [split(randn(8, 3), mesh, Shard(0)), split(randn(8, 3) / 100, mesh, Shard(0))]
    before = [g._version for g in grads]
    torchclip.clip_grad_norm_([parameter(g) for g in grads], 1e6)
    assert [g._version for g in grads] == before


def check_gradients_still_being_reduced() -> None:
    """Local tensors that wait for a collective, as tensor parallelism leaves them."""
    from torch.distributed._functional_collectives import all_reduce

    mesh = init_device_mesh("cpu", (4,))
    full = randn(6, 5)
    pending = all_reduce(full / 4, "sum", mesh)
    assert type(pending) is not Tensor
    grad = DTensor.from_local(pending, mesh, [Replicate()], run_check=False)
    p, oracle = parameter(grad), parameter(full.clone())
    assert torchclip.clip_grad_norm_([p], 0.5) == torchclip.clip_grad_norm_([oracle], 0.5)
    assert_same(p.grad, oracle.grad)


def check_gradients_that_require_grad() -> None:
    mesh = init_device_mesh("cpu", (4,))
    full = randn(6, 5)
    p = parameter(split(full, mesh, Shard(0)).requires_grad_())
    norm = torchclip.get_total_norm(p.grad)
    assert not norm.requires_grad
    assert norm == torchclip.get_total_norm(full)


@world_of(2)
def check_compiled() -> None:
    """A compiled step may break its graph at the exchange; the result is the same."""
    mesh = init_device_mesh("cpu", (2,))
    full = randn(6, 5)
    p, oracle = parameter(split(full, mesh, Shard(0))), parameter(full.clone())
    compiled = torch.compile(lambda q: torchclip.clip_grad_norm_([q], 0.5), backend="eager")
    assert compiled(p) == torchclip.clip_grad_norm_([oracle], 0.5)
    assert_same(p.grad, oracle.grad)
