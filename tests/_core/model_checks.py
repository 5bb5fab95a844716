"""Checks of models that torch spreads over ranks, and of torch's function there."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_helpers import since_2_7, world_of
from dtensors import assert_agreed, assert_same, collectives_of, compare, global_norm, parameter, split, whole
from helpers import randn
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import torchclip
from torchclip.cli.run.recording import recording
from torchclip.cli.run.trial import Trial

INF = math.inf


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
            # A model without DTensors works as before.
            assert type(torch.nn.utils.get_total_norm(fulls)) is Tensor
        assert type(torchclip.get_total_norm(grads)) is Tensor
        for p, full in zip(parameters, fulls, strict=True):
            torch.testing.assert_close(whole(p.grad), full * 0.25 / expected, rtol=1e-5, atol=1e-6)


@world_of(2)
def check_norms_of_dtensors_are_recorded_by_the_run_command() -> None:
    mesh = init_device_mesh("cpu", (2,))
    optimizer = torch.optim.SGD([parameter(split(torch.ones(4), mesh, Shard(0)))], lr=1.0)
    with recording(Trial()) as run:
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
    torchclip.uninstall()
    (record,) = run.optimizers[0].history
    assert (record.total_norm, record.clipped) == (2.0, True)


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
    """Its parameters, typed as Any: they have gradients, and are DTensors if it is sharded."""
    return list(model.parameters())


def model_of(blocks: int = 2, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(blocks))).to(dtype)


def batch_of(ranks: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(4 * ranks, 3, 6, dtype=dtype)


def backward(model: nn.Module, x: Tensor, weight: float = 100.0) -> None:
    (weight * model(x).square().mean()).backward()


def compare_models(model: nn.Module, oracle: nn.Module) -> None:
    """A spread model of float64, whose gradients are clipped as those of one that is not."""
    expected = torchclip.clip_grad_norm_(oracle.parameters(), 0.1)
    actual = torchclip.clip_grad_norm_(model.parameters(), 0.1)
    assert_agreed(actual)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=0)
    for p, q in zip(parameters_of(model), parameters_of(oracle), strict=True):
        torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-11, atol=1e-11)


def my_part(x: Tensor, parts: int = 4, place: int | None = None) -> Tensor:
    return x.chunk(parts)[dist.get_rank() if place is None else place]


def sharded(model: nn.Sequential, **options: Any) -> nn.Sequential:
    for block in model:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def offloaded(model: nn.Sequential) -> nn.Sequential:
    return sharded(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


@since_2_7
def check_fsdp2_in_mixed_precision() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(model_of(), mp_policy=policy)
    backward(model, my_part(batch_of(4, torch.bfloat16)))
    fulls = [whole(p.grad).clone() for p in parameters_of(model)]
    compare(fulls, [p.grad for p in parameters_of(model)], global_norm(0.1))


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


@world_of(2)
def check_compiled() -> None:
    """A compiled step may break its graph at the exchange; the result is the same."""
    mesh = init_device_mesh("cpu", (2,))
    full = randn(6, 5)
    p, oracle = parameter(split(full, mesh, Shard(0))), parameter(full.clone())
    compiled = torch.compile(lambda q: torchclip.clip_grad_norm_([q], 0.5), backend="eager")
    assert compiled(p) == torchclip.clip_grad_norm_([oracle], 0.5)
    assert_same(p.grad, oracle.grad)
