"""How the scripts of this folder measure: in rounds, in which every contender takes a turn.

Everything runs in one process, without Python's garbage collection.  The contenders of a round take turns in
random order, so that a disturbance affects all of them.  Results are quartiles over the rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

import torch

from torchclip.cli import info

__all__ = [
    "machine",
    "one_thread",
    "options_of",
    "print_machine",
    "quartiles",
    "take_turns",
    "without_garbage_collection",
    "write_results",
]


_ORDER = random.Random(0)


def take_turns(
    turns: Mapping[str, Callable[[], float]], least: int, most: int | None = None, seconds: float = 0.0
) -> dict[str, list[float]]:
    """What each contender's function returned in each round: the seconds that its turn took.

    Args:
        turns: the functions, by the contender's name.
        least: the number of rounds.
        most: the largest number of rounds; None for no limit.
        seconds: after ``least`` rounds, further ones begin until this time has passed.
    """
    times: dict[str, list[float]] = {name: [] for name in turns}
    rounds = 0
    with without_garbage_collection():
        end = perf_counter() + seconds
        while rounds < least or (perf_counter() < end and (most is None or rounds < most)):
            for name in _ORDER.sample(list(turns), len(turns)):
                times[name].append(turns[name]())
            rounds += 1
    return times


def quartiles(values: Sequence[float]) -> list[float]:
    """The first, the median, and the third, to six digits."""
    return [float(f"{q:.6g}") for q in quantiles(values, n=4, method="inclusive")]


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Turn Python's garbage collection off, which would slow down the contender whose turn it is."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread within the context."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def machine() -> dict[str, str]:
    """Facts about the machine on which the numbers depend."""
    return {
        "CPU": _cpu_model(),
        "cores": str(os.cpu_count()),
        "load average": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown",
        "commit": _commit(),
        **info.facts(),
    }


def print_machine() -> None:
    """Print these facts, one a line."""
    print("\n".join(f"{name:<18} {value}" for name, value in machine().items()))


def write_results(path: Path, rows: Sequence[Any], versions: Mapping[str, str] | None = None) -> None:
    """Write rows as JSON, each in a line, their numbers with four digits, as more say nothing."""
    facts = json.dumps(machine() | dict(versions or {}), indent=1)
    lines = ",\n".join(json.dumps(_rounded(row)) for row in rows)
    path.write_text(f'{{"machine": {facts},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def _commit() -> str:
    """The last commit of what is measured; in a copy without the history, unknown."""
    found = subprocess.run(
        ["git", "log", "-1", "--format=%h", "--", "torchclip", "setup.py"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    return found.stdout.strip() or "unknown"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def options_of(description: str) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
