"""Checks that thresholds share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torchclip._core import arguments


def between(name: str, value: Any, most: float) -> float:
    """``value`` as a number between 0 and ``most``, or an error that names the argument."""
    number = arguments.number(name, value, text=True)
    if not 0 <= number <= most:
        raise ValueError(f"`{name}` must be between 0 and {most}, got {arguments.shown(value)}")
    return number


def norm(value: Any) -> float:
    """The argument of ``update`` as a float: ``inf`` and ``nan`` are allowed, negative numbers are not."""
    found = value if type(value) is float else arguments.number("norm", value)
    if -math.inf < found < 0:
        raise ValueError(f"`norm` must be at least 0, got {arguments.shown(value)}")
    return found


def finite(name: str, value: Any, text: bool = False) -> float:
    """``value`` as a finite number that is at least 0, or an error that names it.

    With ``text``, a string is allowed too, as in arguments; a saved state has none.
    """
    norm = arguments.threshold(name, arguments.number(name, value, text=text))
    if math.isinf(norm):
        raise ValueError(f"`{name}` must be finite, got {arguments.shown(value)}")
    return norm


def window_of(state: Mapping[str, Any], kind: str, window: int | None, owner: str) -> tuple[int, list[float]]:
    """The number of norms that a saved threshold has learned from, and the norms that it keeps, oldest first.

    Args:
        state: the saved state.
        kind: the kind of threshold.
        window: how many norms the threshold that loads it keeps; None for all.
        owner: the name of that threshold in an error.
    """
    arguments.saved("state", state, ("window", "seen", "norms"), kind)
    if state["window"] != window:
        raise ValueError(
            f"`state` was taken with window={state['window']}, but this is {owner}; "
            f"make the {kind} with the same window"
        )
    seen = arguments.count("state['seen']", state["seen"], least=0)
    norms = arguments.items("state['norms']", state["norms"], finite)
    kept = seen if window is None else min(seen, window)
    if len(norms) != kept:
        raise ValueError(
            f"`state['norms']` must be the last {kept} of the {seen} norms seen, got {len(norms)}"
        )
    return seen, norms
