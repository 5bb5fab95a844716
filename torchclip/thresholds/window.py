"""How the last norms are stored: norm number ``i`` is in slot ``i % window``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def in_slots(norms: Iterable[float], seen: int, window: int) -> list[float]:
    """Put the last of ``seen`` norms, oldest first, into their slots; NaN in empty slots."""
    latest = list(norms)
    slots = [math.nan] * window
    for number, norm in enumerate(latest, start=seen - len(latest)):
        slots[number % window] = norm
    return slots


def in_order(slots: Sequence[float], seen: int) -> list[float]:
    """The norms in the slots, oldest first."""
    first = seen % len(slots)
    return [*slots[:seen]] if seen < len(slots) else [*slots[first:], *slots[:first]]
