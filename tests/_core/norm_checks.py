"""Checks that DTensors in any placement have the norms of the full tensors, and change like them."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_helpers import TORCH, since_2_7
from dtensors import (
    addends,
    assert_agreed,
    assert_same,
    compare,
    global_norm,
    parameter,
    split,
    whole,
    with_norm,
)
from helpers import DTYPES, NORM_TYPES, bits, grad_of, randn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import torchclip

INF = math.inf
# Uneven over 2 and 4 ranks, with fewer rows than ranks, with none, and without an axis.
SHAPES = [(10, 6), (3, 5), (7,), (1,), (2, 1, 3), (0, 4), (16, 4)]


def placements_on(mesh: DeviceMesh, shape: tuple[int, ...]) -> list[tuple[Placement, ...]]:
    """All placements of a tensor on a mesh."""
    each = [Replicate(), *(Shard(d) for d in range(len(shape)))]
    ways = list(itertools.product(each, repeat=mesh.ndim))
    return [*ways, *strided(mesh, shape)]


def strided(mesh: DeviceMesh, shape: tuple[int, ...]) -> list[tuple[Placement, ...]]:
    """How FSDP2 over tensor parallelism splits rows; torch 2.9 itself mixes up uneven ones."""
    if mesh.ndim != 2 or not shape or (TORCH < (2, 10) and shape[0] % mesh.size()):
        return []
    return [(_StridedShard(0, split_factor=mesh.size(1)), Shard(0))]


def check_every_placement() -> None:
    """On a line of ranks and on a grid; one by one, as one mistake may hide another, and together."""
    for mesh in (init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))):
        fulls: list[Tensor] = []
        grads: list[Tensor] = []
        for i, shape in enumerate(SHAPES):
            for way in placements_on(mesh, shape):
                fulls.append(randn(*shape, seed=i))
                grads.append(split(fulls[-1], mesh, *way))
                norm = torchclip.get_total_norm(grads[-1])
                assert_agreed(norm)
                assert norm == torchclip.get_total_norm(fulls[-1])
        fulls.append(randn(3))  # a plain tensor, which all ranks have, counts once
        grads.append(fulls[-1].clone())
        for limit in (1e6, 1.0):
            compare(fulls, [g.clone() for g in grads], global_norm(limit))


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
        for clip in (global_norm(1.0), lambda ps: torchclip.clip_grad_norm_per_parameter_(ps, 1.0)):
            grads = [addends(f, grid, *way) for f, way in zip(fulls, ways, strict=True)]
            compare(fulls, grads, clip)  # not clones, which torch reduces
            assert all(g.placements == way for g, way in zip(grads, ways, strict=True))


def check_pending_sums_are_neither_clamped_nor_zeroed() -> None:
    full = randn(6, 5)
    full[0, 0] = math.nan
    p = parameter(addends(full, init_device_mesh("cpu", (4,)), Partial()))
    other = parameter(torch.tensor([math.nan, 1.0]))
    before = bits(p.grad.to_local()), bits(other.grad)
    optimizer = torch.optim.SGD([{"params": [other]}, {"params": [p]}], lr=1.0)
    torchclip.Clipper(optimizer, 1.0, scope="group", nonfinite="zero")
    for call in (lambda: torchclip.clip_grad_value_([p], 0.1), optimizer.step):
        with pytest.raises(TypeError, match=r"gradient 0 of shape \(6, 5\).*pending.*redistribute"):
            call()
    assert (bits(p.grad.to_local()), bits(other.grad)) == before


def check_ranks_whose_gradients_could_be_zeroed_learn_that_others_could_not() -> None:
    mesh = DeviceMesh("cpu", [0, 1])
    full = torch.tensor([math.nan, 1.0, 2.0])
    p = parameter(addends(full, mesh, Partial()) if dist.get_rank() < 2 else full)
    optimizer = torch.optim.SGD([p], lr=1.0)
    torchclip.Clipper(optimizer, 1.0, nonfinite="zero", group=dist.group.WORLD)
    wrong = (TypeError, "pending") if dist.get_rank() < 2 else (RuntimeError, "refused")
    with pytest.raises(wrong[0], match=wrong[1]):
        optimizer.step()
    assert torchclip.get_total_norm([torch.ones(1)], group=dist.group.WORLD) == 2


def check_pending_products_are_not_scaled() -> None:
    """Each rank would scale its factor."""
    mesh = init_device_mesh("cpu", (4,))
    factors = DTensor.from_local(torch.full((3,), 2.0), mesh, [Partial("product")])
    assert torchclip.get_total_norm(factors) == torchclip.get_total_norm(torch.full((3,), 16.0))
    p = nn.Parameter(split(torch.zeros(3), mesh, Replicate()))
    p.grad = factors
    for call in (torchclip.clip_grad_norm_, torchclip.clip_grads_with_norm_):
        with pytest.raises(TypeError, match=r"gradient 0 of shape \(3,\).*pending.*product.*redistribute"):
            call(p, 1.0, 2.0)
    assert (factors.to_local() == 2).all()


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
    ways = [
        (shape, way)
        for shape in SHAPES
        for way in placements_on(grid, shape)
        if len(shape) < 2 or not any(isinstance(place, Shard) and place.dim for place in way)
    ]
    for order in (1, 2, 3, INF, -1):
        oracles, parameters = list[Any](), list[Any]()
        for shape, way in ways:
            full, weight = randn(*shape), randn(*shape, seed=7, scale=0.1)
            oracles.append(nn.Parameter(weight.clone()))
            oracles[-1].grad = full.clone()
            parameters.append(nn.Parameter(split(weight, grid, *way)))
            parameters[-1].grad = split(full, grid, *way)
        for each in (oracles, parameters):
            torchclip.clip_grad_adaptive_(each, 0.1, norm_type=order)
        for (shape, way), p, oracle in zip(ways, parameters, oracles, strict=True):
            assert_same(p.grad, oracle.grad)
            before = split(randn(*shape), grid, *way).to_local()
            assert torch.equal(p.grad.to_local(), before) or p.grad._version > 0


def check_adaptive_with_pending_sums() -> None:
    """Also on a mesh of some ranks only: the others hold nothing, and wait for nobody."""
    full, weight = randn(6, 5), randn(6, 5, seed=7, scale=0.1)
    for mesh in (init_device_mesh("cpu", (4,)), DeviceMesh("cpu", [0, 2])):
        oracle, p = nn.Parameter(weight.clone()), nn.Parameter(split(weight, mesh, Replicate()))
        oracle.grad, p.grad = full.clone(), addends(full, mesh, Partial())
        for each in (oracle, p):
            torchclip.clip_grad_adaptive_([each], 0.1)
        if mesh.get_coordinate() is not None:
            assert_same(p.grad, oracle.grad)


def check_adaptive_needs_whole_rows() -> None:
    """Rows that tensor parallelism splits; all ranks refuse them, and the next call works."""
    mesh = init_device_mesh("cpu", (2, 2))
    good = nn.Parameter(split(randn(6), mesh, Shard(0), Replicate()))
    good.grad = split(randn(6), mesh, Shard(0), Replicate())
    for way in ((Shard(1), Replicate()), (Shard(0), Shard(1))):
        p = nn.Parameter(split(randn(8, 8), mesh, *way))
        p.grad = split(randn(8, 8), mesh, *way)
        with pytest.raises(TypeError, match=r"parameter 1 of shape \(8, 8\) is split within its rows"):
            torchclip.clip_grad_adaptive_([good, p])
        assert torch.equal(whole(grad_of(good)), randn(6))
    torchclip.clip_grad_adaptive_([good])


def check_adaptive_needs_gradients_split_as_weights() -> None:
    mesh = init_device_mesh("cpu", (4,))
    p = nn.Parameter(split(randn(8, 8), mesh, Shard(0)))
    p.grad = split(randn(8, 8), mesh, Shard(1))
    with pytest.raises(TypeError, match=r"not split as its parameter.*redistribute"):
        torchclip.clip_grad_adaptive_([p])


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


def check_gradients_still_being_reduced() -> None:
    """Local tensors that wait for a collective, such as those of tensor parallelism."""
    from torch.distributed._functional_collectives import all_reduce

    mesh = init_device_mesh("cpu", (4,))
    full = randn(6, 5)
    pending = all_reduce(full / 4, "sum", mesh)
    assert type(pending) is not Tensor
    grad = DTensor.from_local(pending, mesh, [Replicate()], run_check=False)
    p, oracle = parameter(grad), parameter(full.clone())
    assert torchclip.clip_grad_norm_([p], 0.5) == torchclip.clip_grad_norm_([oracle], 0.5)
    assert_same(p.grad, oracle.grad)
