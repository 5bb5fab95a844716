"""What clipping costs inside a training step: the time of clipping and ``step``, minus that of ``step``
alone.

We time clipping inside a real training step, where caches are cold, so a call takes several times as long as
in a tight loop.  All contenders use one model and one optimizer, and take turns in a new random order in each
round.  Otherwise the position of a model in memory, and the previous contender, would matter more than
clipping.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import quantiles
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import torchclip

__all__ = [
    "CONTENDERS",
    "MODELS",
    "OPTIMIZERS",
    "ROUNDS",
    "Row",
    "added",
    "drifts",
    "measure",
    "speedups",
    "without_garbage_collection",
]

ROUNDS = 800
WARM_UP = 30
BATCH = 64

MODELS: dict[str, list[int]] = {"mlp": [17, 64, 64, 6], "layers": [32] * 25}
"""The widths of their layers."""

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-6),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, fused=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-6),
}


class Row(NamedTuple):
    """What is measured together.

    Attributes:
        model: a name in ``MODELS``.
        optimizer: a name in ``OPTIMIZERS``.
        clips: whether the threshold is below the norm, so that gradients are changed.
        dtype: of the parameters.
    """

    model: str
    optimizer: str
    clips: bool
    dtype: torch.dtype = torch.float32


@dataclass
class Setup:
    """The model of a row, its optimizer, and the thresholds of its contenders."""

    model: nn.Module
    optimizer: Optimizer
    max_norm: float
    clip_value: float
    inputs: Tensor
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = list(self.model.parameters())

    def backward(self) -> None:
        """The part of a training step before clipping."""
        self.optimizer.zero_grad()
        self.model(self.inputs).square().mean().backward()


def _nothing(setup: Setup) -> object:
    return None


_torch, _ours = torch.nn.utils, torchclip
CONTENDERS: dict[str, Callable[[Setup], object]] = {
    "no clipping": _nothing,
    "no clipping again": _nothing,
    "torch, a list": lambda s: _torch.clip_grad_norm_(s.parameters, s.max_norm),
    "torch, model.parameters()": lambda s: _torch.clip_grad_norm_(s.model.parameters(), s.max_norm),
    "torch, by value": lambda s: _torch.clip_grad_value_(s.parameters, s.clip_value),
    "function, a list": lambda s: _ours.clip_grad_norm_(s.parameters, s.max_norm),
    "function, model.parameters()": lambda s: _ours.clip_grad_norm_(s.model.parameters(), s.max_norm),
    "function, the model": lambda s: _ours.clip_grad_norm_(s.model, s.max_norm),
    "function, by value": lambda s: _ours.clip_grad_value_(s.parameters, s.clip_value),
    "Clipper": _nothing,
}
"""The function that is called between the backward pass and the step; for a Clipper, none."""

_RIVALS = {
    "function, a list": "torch, a list",
    "function, model.parameters()": "torch, model.parameters()",
    "function, the model": "torch, model.parameters()",
    "function, by value": "torch, by value",
    "Clipper": "torch, a list",
}
_FLOOR = "no clipping"


def measure(
    row: Row, contenders: Sequence[str] = tuple(CONTENDERS), rounds: int = ROUNDS, seed: int = 0
) -> dict[str, list[float]]:
    """The seconds that clipping and ``step`` take in each round, for each contender.

    It uses one thread, and restores torch's number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    order = random.Random(seed)
    try:
        setup = _setup(row)
        hooks = _Hooks(setup.optimizer)
        torchclip.Clipper(setup.optimizer, setup.max_norm)
        hooks.take_off()
        times: dict[str, list[float]] = {name: [] for name in contenders}
        with without_garbage_collection():
            for i in range(WARM_UP + rounds):
                for name in order.sample(list(contenders), len(contenders)):
                    seconds = _turn(setup, name, hooks)
                    if i >= WARM_UP:
                        times[name].append(seconds)
        return times
    finally:
        torch.set_num_threads(threads)


def _turn(setup: Setup, name: str, hooks: _Hooks) -> float:
    clip, step = CONTENDERS[name], setup.optimizer.step
    setup.backward()
    if name == "Clipper":
        hooks.put_on()
    start = perf_counter()
    clip(setup)
    step()
    seconds = perf_counter() - start
    hooks.take_off()
    return seconds


def _setup(row: Row) -> Setup:
    torch.manual_seed(0)
    widths = MODELS[row.model]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).to(row.dtype)
    optimizer = OPTIMIZERS[row.optimizer](list(model.parameters()))
    # Weights hardly change, so the norms of a first backward pass are those of all steps.
    limit = 1e-3 if row.clips else 1e3
    setup = Setup(model, optimizer, limit, limit, torch.randn(BATCH, widths[0], dtype=row.dtype))
    setup.backward()
    grads = [p.grad for p in setup.parameters if p.grad is not None]
    setup.max_norm = limit * float(torchclip.get_total_norm(grads))
    setup.clip_value = limit * max(float(grad.abs().max()) for grad in grads)
    return setup


class _Hooks:
    """Adds a clipper's hooks to an optimizer, and removes them, outside the timed part."""

    def __init__(self, optimizer: Optimizer) -> None:
        handles = [
            register(lambda *_: None)
            for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook)
        ]
        self._registered: list[Any] = [handle.hooks_dict_ref() for handle in handles]
        for handle in handles:
            handle.remove()
        self._kept: list[dict[int, Callable[..., object]]] = []

    def take_off(self) -> None:
        if any(self._registered):
            self._kept = [dict(hooks) for hooks in self._registered]
        for hooks in self._registered:
            hooks.clear()

    def put_on(self) -> None:
        for hooks, kept in zip(self._registered, self._kept, strict=True):
            hooks.update(kept)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Turn Python's garbage collection off, which would slow down the contender whose turn it is."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def added(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Seconds that each contender adds to a step, from what ``measure`` returned.

    They are the lower quartile of its steps, minus that of the steps without clipping.
    """
    firsts = {name: quantiles(of_one, n=4)[0] for name, of_one in times.items()}
    return {name: first - firsts[_FLOOR] for name, first in firsts.items() if name != _FLOOR}


def drifts(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Seconds by which the two halves of the rounds differ in what each contender adds.

    Empty if there are too few rounds.
    """
    middle = len(times[_FLOOR]) // 2
    if middle < 2:
        return {}
    first, second = (
        added({name: of_one[half] for name, of_one in times.items()})
        for half in (slice(None, middle), slice(middle, None))
    )
    return {name: abs(first[name] - second[name]) for name in first}


def speedups(added: Mapping[str, float]) -> dict[str, float]:
    """How many times less than torch each contender of torchclip adds."""
    return {
        name: added[rival] / added[name] for name, rival in _RIVALS.items() if {name, rival} <= added.keys()
    }
