"""Adds a number to every seed that a program sets, so that its runs differ only by chance."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

# Functions and classes that take a seed first, by the object that programs find them in.
_SEEDING: list[tuple[Any, tuple[str, ...]]] = [
    (torch, ("manual_seed",)),
    (torch.random, ("manual_seed",)),
    (torch.cuda, ("manual_seed", "manual_seed_all")),
    (np.random, ("seed", "default_rng")),
    (random, ("seed",)),
]


def add_to_seeds(number: int) -> None:
    """Add a number to all seeds that are set in this process from now on, and to torch's first one."""
    if not number:
        return
    torch.manual_seed(torch.initial_seed() + number)
    for owner, names in _SEEDING:
        for name in names:
            setattr(owner, name, _shifted(getattr(owner, name), number))

    class Generator(torch.Generator):
        def manual_seed(self, seed: int) -> Any:
            return super().manual_seed(_plus(seed, number))

    class RandomState(np.random.RandomState):
        def __init__(self, seed: Any = None) -> None:
            super().__init__(_plus(seed, number))

    class SeedSequence(np.random.SeedSequence):
        def __init__(self, entropy: Any = None, **options: Any) -> None:
            super().__init__(_plus(entropy, number), **options)

    class Random(random.Random):
        def seed(self, a: Any = None, version: int = 2) -> None:
            super().seed(_plus(a, number), version)

    for owner, stand_in in (
        (torch, Generator),
        (np.random, RandomState),
        (np.random, SeedSequence),
        (random, Random),
    ):
        setattr(owner, stand_in.__name__, stand_in)


def _shifted(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    @functools.wraps(function)
    def shifted(*args: Any, **kwargs: Any) -> Any:
        if args:
            return function(_plus(args[0], number), *args[1:], **kwargs)
        name = next((name for name in ("seed", "a") if name in kwargs), None)
        return function(**(kwargs if name is None else {**kwargs, name: _plus(kwargs[name], number)}))

    return shifted


def _plus(seed: Any, number: int) -> Any:
    """A seed with the number added; None and other values that are not integers stay as they are."""
    is_number = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
    return int(seed) + number if is_number else seed
