"""Clipping an FSDP2 model on several ranks of this machine: torch's function and torchclip's.

    python benchmarks/distributed.py [--ranks 2] [--parameters 100 300 1000] [--json FILE]

The ranks talk over gloo.  Each of them has one thread.  Times are medians of the slowest rank's time a call,
with the two functions taking turns, each on gradients of ones; collectives are counted by torch's profiler.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import torchclip

SIDE = 64
ROUNDS = 30
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
    """Seconds that one call takes on this rank, on gradients of ones."""
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


def run_rank(rank: int, ranks: int, store: str, sizes: list[int], result: str) -> None:
    """What each process does; rank 0 writes what all have measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    rows = [row for size in sizes for row in measure(size)]
    if rank == 0:
        Path(result).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| parameters | | torch, ms | torchclip, ms | times faster | collectives: torch | torchclip |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        ms, counts = row["milliseconds"], row["collectives"]
        lines.append(
            f"| {row['parameters']:,} | {row['case']} | {ms['torch']:.2f} | {ms['torchclip']:.2f} "
            f"| {row['times_faster']:.1f} | {counts['torch']} | {counts['torchclip']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parameters", type=int, nargs="+", default=[100, 300, 1000], metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        store, result = f"{folder}/store", f"{folder}/result.json"
        arguments = (options.ranks, store, options.parameters, result)
        torch.multiprocessing.spawn(run_rank, arguments, nprocs=options.ranks)
        rows = json.loads(Path(result).read_text())
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
