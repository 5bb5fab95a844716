"""Histories of runs that are made up, what the advice says of them, and threads that read them."""

import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from torchclip.history import Advice, History
from torchclip.reference import Array

Threshold = float | Callable[[int], float]
Numbers = Sequence[float] | Array


def run_of(norms: Numbers, max_norm: Threshold = math.inf, losses: Numbers | None = None) -> History:
    """The history of a run with these norms."""
    history = History(100_000)
    for step, norm in enumerate(np.asarray(norms).tolist()):
        used = max_norm(step) if callable(max_norm) else max_norm
        clip_coef = 1.0 if norm == 0 or norm == math.inf else min(1.0, used / norm)
        history.append(step, norm, used, clip_coef, loss=None if losses is None else float(losses[step]))
    return history


def advice_on(norms: Numbers, losses: Numbers | None = None) -> Advice:
    return run_of(norms, losses=losses).suggest()


def calm(steps: int = 1000, seed: int = 0, spread: float = 0.3) -> Array:
    return np.random.default_rng(seed).lognormal(sigma=spread, size=steps)


def words(said: object) -> str:
    """What is said, in one line."""
    return " ".join(str(said).split())


@contextmanager
def readers(read: Callable[[], Any]) -> Iterator[list[Any]]:
    """What two other threads read all the time within the context."""
    stop, found = threading.Event(), []

    def keep_reading() -> None:
        while not stop.is_set():
            found.append(read())

    # Threads take turns as often as they can, so that a turn ends in the middle of every operation.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=keep_reading) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        yield found
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert found
