"""Checks of ranks that are not at the same call, and of calls that one rank refuses."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dtensors import as_on_an_accelerator, parameter, split
from helpers import randn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import torchclip
from torchclip._core.ranks.sharded import ShardedBatch
from torchclip.clipper import Scope

INF = math.inf
Calls = list[Callable[[list[Any]], Any]]
BY_NORM: Calls = [
    lambda ps: torchclip.clip_grad_norm_(ps, 0.5),
    lambda ps: torchclip.clip_grad_norm_per_parameter_(ps, 0.5),
    lambda ps: torchclip.clip_grad_rms_(ps, 0.5),
]


def error_of(call: Callable[[], Any]) -> str:
    """The error that a call raises, or ""."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def errors_of(call: Callable[..., Any], *args: Any) -> list[str]:
    """The error that each rank's call raises."""
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error_of(lambda: call(*args)))
    return errors


def expanded(mesh: DeviceMesh) -> DTensor:
    """A gradient that cannot be changed in place, as its elements share memory."""
    return DTensor.from_local(torch.ones(1, 5).expand(2, 5), mesh, [Shard(0)])


def assert_refused_by(rank: int, errors: list[str], own: str) -> None:
    for i, error in enumerate(errors):
        if i == rank:
            assert own in error, error
        else:
            assert error.startswith(f"RuntimeError: rank {rank} refused its gradients or an argument"), error


def check_a_gradient_that_one_rank_refuses() -> None:
    """All ranks raise at once, and the next call is in step."""
    mesh = init_device_mesh("cpu", (4,))
    full = randn(8, 5)
    bad = parameter(split(full, mesh, Shard(0)))
    if dist.get_rank() == 2:
        bad.grad = expanded(mesh)
    calls: Calls = [*BY_NORM, torchclip.clip_grad_adaptive_]
    for clip in calls:
        good = parameter(split(full, mesh, Shard(0)))
        if clip in BY_NORM:
            assert_refused_by(2, errors_of(clip, [good, bad]), "expanded or overlaps itself")
        assert torch.equal(good.grad.full_tensor(), full)
        unit = parameter(split(randn(8, seed=1), mesh, Shard(0)))  # which ranks measure together
        if dist.get_rank() == 2:
            unit.grad = DTensor.from_local(torch.ones(1).expand(2), mesh, [Shard(0)])
        assert_refused_by(2, errors_of(clip, [unit]), "expanded or overlaps itself")
        clip([good])
    good = parameter(split(full, mesh, Shard(0)))
    assert torchclip.clip_grad_norm_([good], 0.5) == torchclip.get_total_norm(full)
    bad.grad = split(full, mesh, Shard(0))
    assert torchclip.clip_grad_norm_([good, bad], INF) == torchclip.get_total_norm(
        [full, good.grad.full_tensor()]
    )


def check_an_argument_that_one_rank_refuses() -> None:
    mesh = init_device_mesh("cpu", (4,))
    full = randn(8, 5)
    grad = split(full, mesh, Shard(0))
    wrong = dist.get_rank() == 1
    minus_one: Any = -1.0 if wrong else 1e6
    word: Any = "x" if wrong else 1e6
    number: Any = 1.0 if wrong else grad
    yes: Any = "yes" if wrong else False
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("`max_norm`", lambda: torchclip.clip_grad_norm_([parameter(grad)], minus_one)),
        (
            "`norm_type`",
            lambda: torchclip.clip_grad_norm_([parameter(grad)], 1e6, math.nan if wrong else 2.0),
        ),
        ("`error_if_nonfinite`", lambda: torchclip.get_total_norm([grad], 2.0, yes)),
        ("`norm_type`", lambda: torchclip.get_total_norm([grad], "two" if wrong else 2)),
        (
            "`max_norm`",
            lambda: torchclip.clip_grad_norm_per_parameter_([parameter(grad)], word),
        ),
        ("`max_rms`", lambda: torchclip.clip_grad_rms_([parameter(grad)], minus_one)),
        ("`tensors`", lambda: torchclip.get_total_norm([grad, number])),
        (
            "`max_norm`",
            lambda: torchclip.clip_grad_norm_([parameter(full.clone())], minus_one, group=dist.group.WORLD),
        ),
    ]
    for own, call in calls:
        assert_refused_by(1, errors_of(call), own)
        assert torchclip.get_total_norm(grad) == torchclip.get_total_norm(full)
    assert torchclip.get_total_norm(full, group=dist.group.WORLD) == 2 * torchclip.get_total_norm(full)


def check_a_refusal_beside_sums_that_are_pending() -> None:
    """The rank that refuses still takes part in the reduction for which the others wait."""
    mesh = init_device_mesh("cpu", (4,))
    pending = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    limit = -1.0 if dist.get_rank() == 3 else 1.0
    assert_refused_by(
        3, errors_of(lambda: torchclip.clip_grad_norm_([parameter(pending)], limit)), "`max_norm`"
    )
    assert torchclip.get_total_norm(pending) == torchclip.get_total_norm(torch.full((3,), 4.0))
    weight = nn.Parameter(split(randn(3), mesh, Replicate()))
    weight.grad = pending
    unit = parameter(split(randn(8), mesh, Shard(0)))  # which ranks measure together
    assert_refused_by(
        3, errors_of(lambda: torchclip.clip_grad_adaptive_([weight, unit], limit)), "`clip_factor`"
    )


def check_a_refusal_that_is_found_while_measuring() -> None:
    """All ranks raise, nothing has changed, and the next call is in step."""
    rank, world = dist.get_rank(), dist.group.WORLD
    mesh = init_device_mesh("cpu", (4,))
    full = randn(8, 5)
    good, own = parameter(split(full, mesh, Shard(0))), parameter(torch.ones(3))
    elsewhere: Any = nn.Parameter(torch.zeros(3, device="meta"))
    elsewhere.grad = torch.ones(3, device="meta")

    def parameters_of_user() -> Iterator[Any]:
        yield own
        if rank == 1:
            raise LookupError("of the user's code")

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    optimizer = torch.optim.SGD([good, own if rank != 1 else elsewhere], lr=1.0)
    clip, each = torchclip.clip_grad_norm_, torchclip.clip_grad_norm_per_parameter_
    with torchclip.Clipper(optimizer, 0.1):
        some = optimizer.param_groups[0]["params"]
        for call in (lambda: clip(some, 0.1), lambda: each(some, 0.1), optimizer.step):
            assert_refused_by(1, errors_of(call), "meta")
    assert_refused_by(1, errors_of(lambda: clip(some, 0.1, group=world)), "meta")
    assert_refused_by(1, errors_of(lambda: clip(parameters_of_user(), 0.1, group=world)), "LookupError")
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(ShardedBatch, "measured", no_memory)
        assert_refused_by(1, errors_of(lambda: clip([good, own], 0.1)), "no memory")
    assert torch.equal(good.grad.full_tensor(), full)
    assert torch.equal(own.grad, torch.ones(3))
    assert clip([good, own], INF) == torchclip.get_total_norm([full, torch.ones(3)])


def check_a_refusal_on_meshes_of_some_ranks() -> None:
    """Ranks of other meshes get the error if something connects them, and no rank waits."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    grad = split(randn(8, 5), grid["dp"], Shard(0))
    limit = -1.0 if dist.get_rank() == 0 else 1e6

    def clip(limit: float, group: Any) -> Tensor:
        return torchclip.clip_grad_norm_([parameter(grad)], limit, group=group)

    for group in (None, grid.get_group("pp"), dist.group.WORLD):
        errors = errors_of(clip, limit, group)
        assert errors[0].startswith("ValueError: `max_norm`")
        assert errors[1].startswith("RuntimeError: rank 0 refused")
        for error in errors[2:]:
            assert not error if group is None else "refused" in error
    assert errors_of(lambda: torchclip.clip_grad_norm_([parameter(grad)], 1e6)) == [""] * 4


def out_of_step(call: Callable[[], Any], again: Callable[[], Any], *say: str) -> None:
    """All ranks raise an error that says what they are at, also in later calls."""
    errors = errors_of(call)
    assert all("ranks are out of step" in error for error in errors), errors
    for each in say:
        assert any(each in error for error in errors), errors
    for _ in range(2):
        assert errors_of(again) == errors


def check_ranks_that_make_different_calls() -> None:
    """They would combine two different exchanges, and take the norm of both."""
    rank = dist.get_rank()
    pairs = [[0, 1], [2, 3]]

    def anew() -> DTensor:
        groups = [dist.new_group(pair) for pair in pairs]
        return split(randn(8, 5), DeviceMesh.from_group(groups[rank // 2], "cpu"), Shard(0))

    def same(grad: DTensor) -> Callable[[], Any]:
        return lambda: torchclip.get_total_norm(grad)

    first = rank % 2 == 0
    grad = anew()
    p = parameter(grad)
    out_of_step(
        lambda: torchclip.get_total_norm(grad) if first else torchclip.clip_grad_norm_([p], 1.0),
        same(grad),
        "clip_grad_norm_",
        "get_total_norm",
    )
    assert torch.equal(p.grad.full_tensor(), randn(8, 5))
    grad = anew()
    assert torchclip.get_total_norm(grad) == torchclip.get_total_norm(randn(8, 5))
    out_of_step(
        lambda: torchclip.get_total_norm(grad, 1.0 if first else 2.0), same(grad), "order 1.0", "order 2.0"
    )
    grad = anew()
    count = 5 + first
    out_of_step(
        lambda: torchclip.clip_grad_norm_per_parameter_([parameter(grad) for _ in range(count)], 1.0),
        same(grad),
        "5 norms",
        "6 norms",
    )


def check_a_refusal_in_the_first_call_with_groups_that_cross() -> None:
    """The ranks first find out which ranks the groups connect: all get the error, and no rank waits.

    On an accelerator that is the next call's, and a rank that refuses sends as many norms as the others.
    """
    rank = dist.get_rank()
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    crossing = [grid.get_group("a"), grid.get_group("b")]
    own, unit = torch.full((2,), 1.0 + rank), parameter(split(randn(8), grid["a"], Shard(0)))
    expected = torchclip.get_total_norm([torch.full((2,), 1.0 + r) for r in range(4)])
    with pytest.MonkeyPatch.context() as patch:
        as_on_an_accelerator(patch)
        limit = -1.0 if rank == 3 else 1.0
        errors = errors_of(lambda: torchclip.clip_grad_adaptive_([unit], limit))
        assert [bool(error) for error in errors] == [False, False, False, True]
        errors = errors_of(lambda: torchclip.get_total_norm([own], group=crossing))
        assert ["rank 3 refused" in error for error in errors] == [False, True, False, True]
        assert torchclip.get_total_norm([own], group=crossing) == expected
    order = math.nan if rank == 1 else 2.0
    groups = crossing[::-1]  # which these ranks have not asked about
    errors = errors_of(lambda: torchclip.clip_grad_norm_([parameter(own)], 1.0, order, group=groups))
    assert_refused_by(1, errors, "`norm_type`")
    assert torchclip.get_total_norm([own], group=groups) == expected


def check_ranks_out_of_step_on_an_accelerator() -> None:
    """No rank waits: the norm is NaN, and the next read raises the error."""
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        as_on_an_accelerator(patch)
        mesh = DeviceMesh.from_group(dist.new_group([0, 1, 2, 3]), "cpu")
        full = randn(8, 5)
        grad = split(full, mesh, Shard(0))
        for order in (0, 1, 2, 3, INF, -1):
            assert torchclip.get_total_norm(grad, order) == torchclip.get_total_norm(full, order)
        # If one rank refuses, the others' gradients become NaN, and the next call is in step.
        p = parameter(split(full, mesh, Shard(0)))  # torch gives a clone an equal mesh of before
        if rank == 3:
            with pytest.raises(ValueError, match="`max_norm`"):
                torchclip.clip_grad_norm_([p], -1.0)
        else:
            assert torchclip.clip_grad_norm_([p], 1.0).isnan()
        errors = errors_of(torchclip.get_total_norm, grad)
        assert all("rank 3 refused" in error for error in errors)
        norm = torchclip.get_total_norm(grad, error_if_nonfinite=True)
        assert norm == torchclip.get_total_norm(full)
        # After different calls: NaN everywhere, and an error in every later call.
        call = (
            torchclip.get_total_norm
            if rank == 0
            else lambda g: torchclip.clip_grad_norm_([parameter(g)], INF)
        )
        assert call(grad).isnan()
        for _ in range(2):
            errors = errors_of(torchclip.get_total_norm, grad)
            assert all("ranks are out of step" in error for error in errors)
        with pytest.raises(RuntimeError, match="ranks are out of step"):
            torchclip.get_total_norm(grad, error_if_nonfinite=True)
        # Reading a norm is enough.
        grad = split(full, DeviceMesh.from_group(dist.new_group([0, 1, 2, 3]), "cpu"), Shard(0))
        with pytest.raises(RuntimeError, match="ranks are out of step"):
            torchclip.clip_grad_norm_([parameter(grad)], 1.0, 1.0 + rank % 2, error_if_nonfinite=True)


def check_clippers_that_one_rank_refuses_or_is_not_in_step_with() -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (4,))
    full = randn(8, 5)

    def made(groups: int = 1, scope: Scope = "global") -> tuple[list[Any], Any, torchclip.Clipper]:
        mesh = DeviceMesh.from_group(dist.new_group([0, 1, 2, 3]), "cpu")
        parameters = [parameter(split(full, mesh, Shard(0))) for _ in range(groups)]
        optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=1.0)
        return parameters, optimizer, torchclip.Clipper(optimizer, 0.5, scope=scope)

    scopes: list[Scope] = ["global", "group", "parameter"]
    for scope in scopes:
        (p, q), optimizer, clipper = made(2, scope)
        if rank == 2:
            q.grad = expanded(mesh)
        assert_refused_by(2, errors_of(optimizer.step), "expanded or overlaps itself")
        assert len(clipper.history) == 0
        assert (p.to_local() == 0).all()
        q.grad = split(full, q.device_mesh, Shard(0))
        if rank == 1:
            optimizer.param_groups[1]["max_norm"] = -1.0
        assert_refused_by(1, errors_of(optimizer.step), "max_norm")
        optimizer.param_groups[1].pop("max_norm", None)
        optimizer.step()
        norm = float(torchclip.get_total_norm([full, full.clone()]))
        assert clipper.history[0].total_norm == pytest.approx(norm)
    (p,), optimizer, clipper = made()
    out_of_step(
        clipper.norms if rank == 0 else optimizer.step, optimizer.step, "Clipper.norms", "a Clipper's step"
    )
    assert (p.to_local() == 0).all()
