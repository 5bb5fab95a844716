"""The search for a threshold: from the advice up and down by factors of 3, until both sides are worse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torchclip.history.history import History

__all__ = ["Outcome", "search"]

_FACTOR = 3
_MOST_RUNS = 8


class Outcome(NamedTuple):
    """What a run with a threshold came to."""

    threshold: float
    """``inf`` for no clipping."""
    loss: float
    """At the end; ``inf`` if the run failed."""
    history: History


def search(run: Callable[[Sequence[float]], Sequence[Outcome]]) -> list[Outcome]:
    """Run without clipping, with what that run advises, and with its neighbours until they are worse.

    Args:
        run: runs with each of some thresholds; returns fewer outcomes if it was interrupted.

    Returns:
        What was run, in this order; at most eight.
    """
    outcomes = list(run([math.inf]))
    thresholds = [] if not outcomes else _around(_start(outcomes[0].history))
    while thresholds and len(outcomes) + len(thresholds) <= _MOST_RUNS:
        found = run(thresholds)
        outcomes += found
        if len(found) < len(thresholds):
            break
        clipped = sorted(outcomes[1:])
        best = min(clipped, key=lambda outcome: outcome.loss)
        thresholds = [_two_digits(best.threshold / _FACTOR)] if best is clipped[0] else []
        thresholds += [_two_digits(best.threshold * _FACTOR)] if best is clipped[-1] else []
    return outcomes


def _start(history: History) -> float:
    """What the run without clipping advises; its median norm if that is nothing, and 1 without any."""
    advised = history.suggest().max_norm
    middle = history.summary().quantiles.get(0.5, 0.0)
    return advised or _two_digits(middle) or 1.0


def _around(threshold: float) -> list[float]:
    return [threshold, _two_digits(threshold / _FACTOR), _two_digits(threshold * _FACTOR)]


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")
