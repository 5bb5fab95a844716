"""Clipping on several ranks: torch's function and torchclip's, few ranks and very many.

    python benchmarks/distributed.py fsdp2 [--ranks 2] [--parameters 100 300 600 1000] [--json FILE]
    python benchmarks/distributed.py exchange [--ranks 2 8 16 32 64] [--json FILE]
    python benchmarks/distributed.py fake [--ranks 2 256 131072] [--parameters 20 100 600 1000] [--json FILE]

``fsdp2`` clips a model on ranks of this machine that communicate over gloo, with one thread each.  The two
functions take turns, on gradients of ones.  It prints medians of the slowest rank's time per call; torch's
profiler counts the collectives.

``exchange`` joins one norm from each rank, and 1,000 from each: torch's way, one reduction of float32 sums,
and torchclip's, one or two reductions of exact integers.

``fake`` is one rank of many, on a process group from torch's testing modules that sends nothing.  It measures
the CPU time of a whole call.  The page docs/distributed.md adds the network's time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import torchclip
from torchclip._core.ranks import exchange

SIDE = 64
ROUNDS = 30
FEW_ROUNDS = 9
CASES = {"clipping": 1e-3, "not clipping": 1e9}


def fsdp2_model(parameters: int) -> nn.Module:
    """Layers of SIDE by SIDE without a bias, ten of them a sharded unit, as a transformer's block has."""
    units = [
        nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(10)))
        for _ in range(parameters // 10)
    ]
    model = nn.Sequential(*units)
    for unit in model:
        fully_shard(unit)
    fully_shard(model)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    return model


def of_torch(parameters: list[Tensor], max_norm: float) -> Tensor:
    """Torch's function, and the norm in the form that can be used."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


CONTENDERS: dict[str, Callable[[list[Tensor], float], Tensor]] = {
    "torch": of_torch,
    "torchclip": torchclip.clip_grad_norm_,
}


def measure(parameters: int) -> list[dict[str, Any]]:
    """One row for each case, on every rank."""
    tensors: list[Tensor] = list(fsdp2_model(parameters).parameters())
    collectives = {name: count_collectives(clip, tensors) for name, clip in CONTENDERS.items()}
    rows = []
    for case, max_norm in CASES.items():
        times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for _ in range(ROUNDS):
            for name, clip in CONTENDERS.items():
                times[name].append(slowest(time_of(clip, tensors, max_norm)))
        milliseconds = {name: 1e3 * statistics.median(values) for name, values in times.items()}
        rows.append(
            {
                "parameters": parameters,
                "case": case,
                "ranks": dist.get_world_size(),
                "milliseconds": milliseconds,
                "times_faster": milliseconds["torch"] / milliseconds["torchclip"],
                "collectives": collectives,
            }
        )
    return rows


def time_of(clip: Callable[[list[Tensor], float], Tensor], tensors: list[Tensor], max_norm: float) -> float:
    """The seconds of one call on this rank, with gradients of ones."""
    for tensor in tensors:
        assert isinstance(tensor.grad, DTensor)
        tensor.grad.to_local().fill_(1.0)
    dist.barrier()
    start = time.perf_counter()
    clip(tensors, max_norm)
    return time.perf_counter() - start


def slowest(seconds: float) -> float:
    """The longest time of all ranks."""
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def count_collectives(clip: Callable[[list[Tensor], float], Tensor], tensors: list[Tensor]) -> int:
    """How many collectives one call makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        clip(tensors, 1e9)
    return sum(event.name.startswith("gloo:") for event in profile.events())


def fsdp2(rank: int, ranks: int, store: str, sizes: list[int], result: str) -> None:
    """What each process does; rank 0 writes what all have measured."""
    with process_group(rank, ranks, store):
        rows = [row for size in sizes for row in measure(size)]
        if rank == 0:
            Path(result).write_text(json.dumps(rows))


@contextmanager
def process_group(rank: int, ranks: int, store: str) -> Iterator[None]:
    """All ranks of this machine, over gloo."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    yield
    dist.barrier()
    dist.destroy_process_group()


# One exchange


def by_torch(norms: list[float]) -> None:
    """As DTensor's ``full_tensor()`` does it: without anything that shows whether ranks are in step."""
    powers = torch.tensor(norms) ** 2
    dist.all_reduce(powers)
    powers.sqrt_().tolist()


def by_torchclip(norms: list[float]) -> None:
    """With sums that are exact, and with what shows whether ranks are in step."""
    call = exchange.Call(exchange.Kind.MEASURE, 2.0)
    world: Any = dist.group.WORLD
    exchange.exchange([world], norms, call, "cpu")
    assert call.error is None


WAYS = {"torch": by_torch, "torchclip": by_torchclip}


def exchanges(rank: int, ranks: int, store: str, counts: list[int], result: str) -> None:
    """What each process does; rank 0 writes what all have measured."""
    rows: list[dict[str, Any]] = []
    with process_group(rank, ranks, store):
        for count in counts:
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(ROUNDS if ranks < 16 else FEW_ROUNDS):
                for way, join in WAYS.items():
                    dist.barrier()
                    start = time.perf_counter()
                    join([1.0 + rank] * count)
                    times[way].append(slowest(time.perf_counter() - start))
            milliseconds = {way: 1e3 * statistics.median(values) for way, values in times.items()}
            rows.append({"ranks": ranks, "norms": count, "milliseconds": milliseconds})
        if rank == 0:
            Path(result).write_text(json.dumps(rows))


# One rank of many


def fake(ranks: int, parameters: int) -> dict[str, Any]:
    """The CPU time of a call on one of very many ranks; nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    tensors: list[Any] = []
    for _ in range(parameters):
        parameter, gradient = (
            DTensor.from_local(value(SIDE), mesh, [Shard(0)], run_check=False)
            for value in (torch.zeros, torch.ones)
        )
        tensors.append(nn.Parameter(parameter))
        tensors[-1].grad = gradient
    calls: dict[str, Callable[[], Any]] = {
        "torch": lambda: of_torch(tensors, 1e9),
        "one norm": lambda: torchclip.clip_grad_norm_(tensors, 1e9),
        "each": lambda: torchclip.clip_grad_norm_per_parameter_(tensors, 1e9),
    }
    times: dict[str, list[int]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.process_time_ns()
            call()
            times[name].append(time.process_time_ns() - start)
    milliseconds = {name: statistics.median(some) / 1e6 for name, some in times.items()}
    dist.destroy_process_group()
    return {"ranks": ranks, "parameters": parameters, "milliseconds": milliseconds}


# Tables


def table_of_fsdp2(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| ranks | parameters | | torch, ms | torchclip, ms | times faster | collectives: torch | ours |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        ms, counts = row["milliseconds"], row["collectives"]
        lines.append(
            f"| {row['ranks']} | {row['parameters']:,} | {row['case']} "
            f"| {ms['torch']:.2f} | {ms['torchclip']:.2f} | {row['times_faster']:.1f} "
            f"| {counts['torch']} | {counts['torchclip']} |"
        )
    return "\n".join(lines)


def table_of_exchanges(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| ranks | norms of each | torch, ms | torchclip, ms |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        ms = " | ".join(f"{row['milliseconds'][way]:.2f}" for way in WAYS)
        lines.append(f"| {row['ranks']} | {row['norms']:,} | {ms} |")
    return "\n".join(lines)


def table_of_fakes(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| ranks | parameters | torch, ms | torchclip, ms | times faster | a norm for each, ms |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        ms = row["milliseconds"]
        lines.append(
            f"| {row['ranks']:,} | {row['parameters']:,} | {ms['torch']:.2f} | {ms['one norm']:.2f} "
            f"| {ms['torch'] / ms['one norm']:.1f} | {ms['each']:.2f} |"
        )
    return "\n".join(lines)


def on_ranks(work: Callable[..., None], ranks: int, sizes: list[int]) -> list[dict[str, Any]]:
    """What rank 0 writes, of ranks that are processes of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        store, result = f"{folder}/store", f"{folder}/result.json"
        # Forked, as many processes would take minutes to import torch.
        torch.multiprocessing.start_processes(
            work, (ranks, store, sizes, result), nprocs=ranks, start_method="fork"
        )
        rows: list[dict[str, Any]] = json.loads(Path(result).read_text())
    return rows


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["fsdp2", "exchange", "fake"])
    parser.add_argument("--ranks", type=int, nargs="+", metavar="N")
    parser.add_argument("--parameters", type=int, nargs="+", metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.what == "fsdp2":
        sizes = options.parameters or [100, 300, 600, 1000]
        rows = [row for ranks in options.ranks or [2] for row in on_ranks(fsdp2, ranks, sizes)]
        print(table_of_fsdp2(rows))
    elif options.what == "exchange":
        rows = []
        for ranks in options.ranks or [2, 8, 16, 32, 64]:
            rows += on_ranks(exchanges, ranks, options.parameters or [1, 1000])
        print(table_of_exchanges(rows))
    else:
        sizes = options.parameters or [20, 100, 600, 1000]
        rows = [fake(ranks, size) for ranks in options.ranks or [2, 256, 131_072] for size in sizes]
        print(table_of_fakes(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
