"""The training of ``examples/char_rnn.py``, for the scripts that compare ways of clipping in it."""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import char_rnn

__all__ = ["batches", "in_parallel", "new_model", "optimizer_of", "perplexity_of", "shown", "train"]

Batches = Iterable[tuple[Tensor, Tensor]]
RECENT = 20  # steps whose mean loss is the final one
DIVERGED = 1e15


@cache
def text() -> tuple[Tensor, str]:
    """Python's documentation as numbers, and its characters."""
    return char_rnn.read()


def batches(steps: int, batch: int = 16) -> Batches:
    """Windows of the text, and the same windows one character later."""
    return char_rnn.batches(text()[0], steps, batch)


def new_model(kind: str, seed: int, hidden: int = 64) -> nn.Module:
    """A model with the weights of a seed, in a process that uses one thread from now on."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    return char_rnn.new_model(kind, len(text()[1]), hidden)


def optimizer_of(kind: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer of the example."""
    optimizer = torch.optim.AdamW if kind == "transformer" else torch.optim.SGD
    return optimizer(model.parameters(), lr=lr)


def train(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], batches: Batches
) -> Iterator[Tensor]:
    """Train, and yield each loss before the step; one that is not finite is the last."""
    state = None
    for inputs, targets in batches:
        scores, state = model(inputs, char_rnn.detached(state))
        loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        yield loss.detach()
        for optimizer in optimizers:
            optimizer.step()
        if not loss.isfinite():
            return


def perplexity_of(losses: Sequence[float]) -> float:
    """The perplexity of the last steps, infinite if the run diverged."""
    mean = statistics.fmean(losses[-RECENT:])
    return math.exp(mean) if mean < math.log(DIVERGED) else math.inf


def shown(perplexity: float) -> str:
    """A perplexity as people write it."""
    if math.isinf(perplexity):
        return "diverged"
    return f"{perplexity:.1e}" if perplexity >= 1e5 else f"{perplexity:,.{1 if perplexity < 100 else 0}f}"


def in_parallel(trained: Callable[[Any], Any], runs: Sequence[Any]) -> list[Any]:
    """The results of all runs, one a core at a time, with a progress bar and the remaining time."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        found = pool.map(trained, runs)
        return list(track(found, "Training", len(runs), console=Console(stderr=True)))
