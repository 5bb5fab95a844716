"""Checks that thresholds share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torchclip._core import arguments

__all__ = ["between", "finite", "norm", "state_of"]


def between(name: str, value: Any, most: float) -> float:
    """``value`` as a number between 0 and ``most``, or an error that names the argument."""
    number = arguments.number(name, value)
    if not 0 <= number <= most:
        raise ValueError(f"`{name}` must be between 0 and {most}, got {arguments.shown(value)}")
    return number


def norm(value: Any) -> float:
    """What ``update`` is given, as a float: ``inf`` and ``nan`` may come, negative numbers may not."""
    found = value if type(value) is float else arguments.number("norm", value)
    if -math.inf < found < 0:
        raise ValueError(f"`norm` must be at least 0, got {arguments.shown(value)}")
    return found


def finite(name: str, value: Any) -> float:
    """``value`` as a finite number that is at least 0, or an error that names it."""
    norm = arguments.threshold(name, arguments.number(name, value))
    if math.isinf(norm):
        raise ValueError(f"`{name}` must be finite, got {arguments.shown(value)}")
    return norm


def state_of(state: Mapping[str, Any], kind: str, keys: tuple[str, ...]) -> None:
    """Raise an error for a saved state that is not of this kind of threshold, or lacks a key."""
    arguments.saved("state", state, ["kind"], kind)
    if state["kind"] != kind:
        raise ValueError(
            f"`state` was taken from a threshold of kind {state['kind']!r}; a {kind} cannot go on from it"
        )
    arguments.saved("state", state, keys, kind)
