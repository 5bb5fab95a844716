"""The norm of one large tensor on one thread, compared with ``tensor.sum()``: memory that is read once.

    python benchmarks/large_norm.py [--megabytes N] [--rounds N] [--dtype D]

Torch, torchclip and ``sum()`` take turns.  It prints the shortest time of each, in milliseconds, and how many
times that of ``sum()`` this is.
"""

import argparse
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

import torchclip
from torchclip import kernel


def main() -> None:
    """Measure, and print a line for each."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--megabytes", type=int, default=600, help="(default: 600)")
    parser.add_argument("--rounds", type=int, default=30, help="(default: 30)")
    parser.add_argument("--dtype", default="float32", help="(default: float32)")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    torch.set_num_threads(1)
    tensor = torch.randn(arguments.megabytes * 1_000_000 // dtype.itemsize, dtype=dtype)
    best = measure(tensor, arguments.rounds)
    print(f"{arguments.megabytes} MB of {arguments.dtype}, kernel {kernel.status()}")
    for name, seconds in best.items():
        print(f"{name:9} {1e3 * seconds:7.2f} ms  {seconds / best['sum()']:.2f}")


def measure(tensor: Tensor, rounds: int) -> dict[str, float]:
    """The shortest time of each, in seconds."""
    calls: dict[str, Callable[[], Tensor]] = {
        "sum()": tensor.sum,
        "torchclip": lambda: torchclip.get_total_norm(tensor),
        "torch": lambda: torch.nn.utils.get_total_norm(tensor),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = perf_counter()
            call()
            times[name].append(perf_counter() - start)
    return {name: min(seconds) for name, seconds in times.items()}


if __name__ == "__main__":
    main()
