"""What one of very many ranks would send: torch's testing process group sends nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

import torchclip
from torchclip._core import mesh, messages


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
    """Of each message, the number of ranks and the bytes."""
    seen: list[tuple[int, int]] = []
    for name in ("gather", "reduced"):
        send = getattr(messages, name)

        def recorded(group: Any, array: Any, *op: Any, send: Any = send) -> Any:
            seen.append((group.size(), array.nbytes))
            return send(group, array, *op)

        monkeypatch.setattr(messages, name, recorded)
    return seen


def test_messages_do_not_grow_with_the_number_of_ranks(sent: list[tuple[int, int]]) -> None:
    of_ranks = []
    for ranks in (1024, 4096, 131_072):
        with fake_ranks(ranks):
            mesh = init_device_mesh("cpu", (ranks,))
            parameters = [parameter(mesh, Shard(0)) for _ in range(50)]
            torchclip.clip_grad_norm_(parameters, 1.0)
            of_norm = [size for _, size in sent]
            sent.clear()
            torchclip.clip_grad_norm_per_parameter_(parameters, 1.0)
            of_ranks.append((of_norm, [size for _, size in sent]))
            sent.clear()
    assert of_ranks[0] == of_ranks[1] == of_ranks[2]
    of_norm, of_each = of_ranks[0]
    assert (len(of_norm), len(of_each)) == (2, 3)
    assert sum(of_norm) < 300
    assert sum(of_each[1:]) == 24 * 50


def test_the_first_dtensor_of_a_process_may_be_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter without a gradient: torch does not return its local part itself."""
    monkeypatch.setattr(mesh, "_readers", [])
    with fake_ranks(2):
        line = init_device_mesh("cpu", (2,))
        lacking = parameter(line, Shard(0))
        lacking.grad = None
        assert torchclip.clip_grad_norm_([lacking, parameter(line, Shard(0))], 1.0) > 0


@pytest.mark.skipif(
    not hasattr(DeviceMesh, "_get_root_mesh"), reason="this torch keeps flattened meshes elsewhere"
)
def test_one_exchange_over_a_mesh_that_was_flattened(sent: list[tuple[int, int]]) -> None:
    with fake_ranks(8):
        root = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pp", "dp", "tp"))
        mesh = root["dp", "tp"]
        gradients = [parameter(mesh, *way).grad for way in ((Shard(0), Shard(0)), (Shard(0), Replicate()))]
        torchclip.get_total_norm(gradients)
        assert [ranks for ranks, _ in sent] == [2, 2]
        sent.clear()
        mesh._flatten("dp_tp")
        torchclip.get_total_norm(gradients)
        assert [ranks for ranks, _ in sent] == [4]
