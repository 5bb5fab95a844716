"""Adds a number to every seed that a program sets, so that its runs differ only by chance."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

# Functions that take a seed first, by the object that programs find them in.
_FUNCTIONS: list[tuple[Any, tuple[str, ...]]] = [
    (torch, ("manual_seed",)),
    (torch.random, ("manual_seed",)),
    (torch.cuda, ("manual_seed", "manual_seed_all")),
    (np.random, ("seed", "default_rng")),
    (random, ("seed",)),
]
# Classes, with the method that takes a seed.
_CLASSES: list[tuple[Any, str, str]] = [
    (torch, "Generator", "manual_seed"),
    (np.random, "RandomState", "__init__"),
    (np.random, "SeedSequence", "__init__"),
    (random, "Random", "seed"),
]
_NAMES = ("seed", "entropy", "a")  # of the argument


def add_to_seeds(number: int) -> None:
    """Add a number to all seeds that are set in this process from now on, and to torch's first one."""
    if not number:
        return
    torch.manual_seed(torch.initial_seed() + number)
    for owner, names in _FUNCTIONS:
        for name in names:
            setattr(owner, name, _shifted(getattr(owner, name), number, 0))
    for owner, name, method in _CLASSES:
        base = getattr(owner, name)
        shifted = _shifted(getattr(base, method), number, 1)  # after self
        # The module in which pickle finds it.
        setattr(owner, name, type(name, (base,), {method: shifted, "__module__": owner.__name__}))


def _shifted(function: Callable[..., Any], number: int, position: int) -> Callable[..., Any]:
    """A function that adds the number to the seed that it gets, by position or by name."""

    @functools.wraps(function)
    def shifted(*args: Any, **kwargs: Any) -> Any:
        given = [_plus(value, number) if i == position else value for i, value in enumerate(args)]
        named = {name: _plus(value, number) if name in _NAMES else value for name, value in kwargs.items()}
        return function(*given, **named)

    return shifted


def _plus(seed: Any, number: int) -> Any:
    """A seed with the number added; None and other values that are not integers stay as they are."""
    is_number = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
    return int(seed) + number if is_number else seed
