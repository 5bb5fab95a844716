"""How ``torchclip bench`` measures: in rounds, in which every contender takes a turn.

Everything runs in one process, without Python's garbage collection.  The contenders of a round take turns in
random order, so that a disturbance affects all of them.  Results are quartiles over the rounds.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import quantiles
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

__all__ = ["one_thread", "progress", "quartiles", "take_turns", "without_garbage_collection"]


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
    order = random.Random(0)
    rounds = 0
    with without_garbage_collection():
        end = perf_counter() + seconds
        while rounds < least or (perf_counter() < end and (most is None or rounds < most)):
            for name in order.sample(list(turns), len(turns)):
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


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr; the yielded function advances it, and it is not drawn during timings."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as progress:
        task = progress.add_task("", total=total)

        def begin(description: str) -> None:
            progress.update(task, description=description)
            progress.refresh()
            progress.advance(task)

        yield begin
