"""What one of very many ranks would send: torch's testing process group sends nothing."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

import torchclip
from torchclip._core.ranks import limbs


@contextmanager
def fake_ranks(ranks: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def parameter(mesh: DeviceMesh, *placements: Placement) -> Any:
    result: Any = nn.Parameter(DTensor.from_local(torch.zeros(4), mesh, placements, run_check=False))
    result.grad = DTensor.from_local(torch.ones(4), mesh, placements, run_check=False)
    return result


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each reduction, the number of ranks and the bytes."""
    seen: list[tuple[int, int]] = []
    all_reduce = dist.all_reduce

    def recorded(words: torch.Tensor, op: Any, group: Any) -> None:
        seen.append((group.size(), words.nbytes))
        all_reduce(words, op, group=group)

    monkeypatch.setattr(dist, "all_reduce", recorded)
    return seen


def test_messages_do_not_grow_with_the_number_of_ranks(sent: list[tuple[int, int]]) -> None:
    """Every call begins with the same one; single parameters, and other orders, take further ones."""
    for ranks in (2, 1024, 131_072):
        with fake_ranks(ranks):
            mesh = init_device_mesh("cpu", (ranks,))
            parameters = [parameter(mesh, Shard(0)) for _ in range(50)]
            calls: list[tuple[Callable[..., Any], float, list[int]]] = [
                (torchclip.clip_grad_norm_, 2.0, []),
                (torchclip.clip_grad_norm_per_parameter_, 2.0, [46 * 8 * limbs.WORDS]),
                (torchclip.clip_grad_norm_per_parameter_, math.inf, [50 * 8]),
                (torchclip.clip_grad_norm_, 3.0, [8, 8 * limbs.WORDS]),
            ]
            for clip, order, further in calls:
                sent.clear()
                clip(parameters, 1.0, order)
                (count, first), *others = sent
                assert (count, first) == (ranks, 4456)
                assert [size for _, size in others] == further


def test_sums_over_very_many_ranks_stay_in_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 131,072 ranks has the same norm, which is among the largest."""
    largest = 1e305
    monkeypatch.setattr(dist, "all_reduce", lambda words, op, group: words.mul_(group.size()))
    with fake_ranks(131_072):
        grad = parameter(init_device_mesh("cpu", (131_072,)), Shard(0)).grad.double() * largest
        assert torchclip.get_total_norm(grad) == pytest.approx(2 * largest * 131_072**0.5, rel=1e-15)


def test_a_mesh_of_some_ranks_is_summed_over_dimension_by_dimension(sent: list[tuple[int, int]]) -> None:
    with fake_ranks(24):
        root = init_device_mesh("cpu", (2, 3, 4), mesh_dim_names=("pp", "dp", "tp"))
        ways = ((Shard(0), Shard(0)), (Shard(0), Replicate()))
        gradients = [parameter(root["dp", "tp"], *way).grad for way in ways]
        torchclip.get_total_norm(gradients)
        assert [ranks for ranks, _ in sent] == [3, 4]
