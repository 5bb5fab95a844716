"""The last norms, as they are kept: the norm that was learned as number ``i`` is in slot ``i % window``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

__all__ = ["in_order", "in_slots"]


def in_slots(norms: Iterable[float], seen: int, window: int) -> list[float]:
    """The last of ``seen`` norms, oldest first, in their slots; NaN in those that have none yet."""
    latest = list(norms)
    slots = [math.nan] * window
    for number, norm in enumerate(latest, start=seen - len(latest)):
        slots[number % window] = norm
    return slots


def in_order(slots: Sequence[float], seen: int) -> list[float]:
    """The norms of these slots, oldest first."""
    first = seen % len(slots)
    return [*slots[:seen]] if seen < len(slots) else [*slots[first:], *slots[:first]]
