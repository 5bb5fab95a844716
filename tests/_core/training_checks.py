"""Checks of training with a Clipper where torch spreads the model over ranks."""

import itertools
import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_helpers import since_2_7, world_of
from dtensors import assert_same, parameter, split, whole
from helpers import last_of, randn
from model_checks import backward, batch_of, model_of, my_part, offloaded, parameters_of, sharded
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import torchclip
from torchclip.clipper import Nonfinite, Scope
from torchclip.thresholds import MaxNorm

INF = math.inf
SCOPES: list[Scope] = ["global", "group", "parameter"]

POLICIES: list[Nonfinite] = ["propagate", "skip", "zero"]


def steps(
    model: nn.Module,
    x: Tensor,
    make_clipper: Callable[..., torchclip.Clipper],
    steps: int = 3,
    bad_step: int | None = None,
    **options: Any,
) -> tuple[list[tuple[float, float, float, bool]], list[Tensor]]:
    """Train a little; returns the clipper's records and the final parameters."""
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
    """Norms, thresholds and decisions are the same on all ranks, and as in one process."""
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
    thresholds: list[MaxNorm] = [INF, lambda step: 0.1 / (1 + step), torchclip.Percentile(50.0)]
    some: list[MaxNorm] = [0.1, torchclip.ZScore(warmup=2)]
    for max_norm, scope in [*itertools.product(some, SCOPES), *((each, "global") for each in thresholds)]:
        compare_training(lambda o, m=max_norm, s=scope: torchclip.Clipper(o, m, scope=s))
    compare_training(lambda o: torchclip.Clipper(o, 0.1), fused=True)
    compare_training(lambda o: torchclip.Clipper(o, 0.1), foreach=True)


@since_2_7
@world_of(2)
def check_clipper_on_fsdp2_with_offload_to_the_cpu_and_in_fused_steps() -> None:
    def clipper(optimizer: torch.optim.Optimizer) -> torchclip.Clipper:
        return torchclip.Clipper(optimizer, 0.1)

    compare_training(clipper, offloaded)
    # Only with float32 gradients a fused step applies the coefficient, as its ``grad_scale``.
    compare_training(clipper, offloaded, torch.float32, 1e-3, fused=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchclip.clipper.fused._TOO_SMALL", 0)
        for shard in (sharded, offloaded):
            compare_training(clipper, shard, torch.float32, 1e-3, fused=True)


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


def check_clipper_over_groups() -> None:
    """Stages of a pipeline: every rank has its own parameters."""
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
            records = last_of(clipper), last_of(expected)
            actual, wanted = ([value for value in record if value is not None] for record in records)
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


@since_2_7
def check_a_checkpoint_that_another_number_of_ranks_loads() -> None:
    """Four ranks save, two continue, and then one; norms and thresholds are as on one rank."""
    rank = dist.get_rank()
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    path = Path(folder[0])

    def made(mesh: DeviceMesh | None) -> tuple[Any, Any, torchclip.Clipper]:
        full = torch.zeros(8, 3)
        p = parameter(None, full if mesh is None else split(full, mesh, Shard(0)))
        optimizer = torch.optim.SGD([p], lr=1.0)
        return (
            p,
            optimizer,
            torchclip.Clipper(optimizer, torchclip.Percentile(50), skip_above=torchclip.ZScore(warmup=2)),
        )

    def trained(steps: range, mesh: DeviceMesh | None, p: Any, optimizer: Any) -> None:
        for step in steps:
            full = randn(8, 3, seed=step)
            p.grad = full if mesh is None else split(full, mesh, Shard(0))
            optimizer.step()

    everyone = init_device_mesh("cpu", (4,))
    alone, saved = made(None), made(everyone)
    trained(range(4), None, *alone[:2])
    trained(range(4), everyone, *saved[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"clipper": saved[2]}, checkpoint_id=path / "4")
        for ranks in (2, 1):
            world, place = (ranks, rank) if rank < ranks else (1, 0)
            store = dist.FileStore(
                str(path / (f"store {ranks}" if rank < ranks else f"store {ranks} {rank}")), world
            )
            dist.barrier()
            dist.destroy_process_group()
            dist.init_process_group("gloo", store=store, rank=place, world_size=world)
            if rank >= ranks:
                continue
            mesh = init_device_mesh("cpu", (ranks,))
            loaded = made(mesh)
            dcp.load({"clipper": loaded[2]}, checkpoint_id=path / str(2 * ranks))
            trained(range(8 - 2 * ranks, 10 - 2 * ranks), None, *alone[:2])
            trained(range(8 - 2 * ranks, 10 - 2 * ranks), mesh, *loaded[:2])
            torch.testing.assert_close(
                torch.tensor([(r.total_norm, r.max_norm, r.clip_coef) for r in loaded[2].history]),
                torch.tensor([(r.total_norm, r.max_norm, r.clip_coef) for r in alone[2].history]),
            )
            dcp.save({"clipper": loaded[2]}, checkpoint_id=path / str(ranks))
