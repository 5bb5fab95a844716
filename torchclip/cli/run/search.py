"""The search for a threshold: up and down from the advice by factors of 3, until both sides are worse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torchclip.history.history import History
from torchclip.history.number import two_digits

_FACTOR = 3
_MOST_RUNS = 8


class Outcome(NamedTuple):
    """The outcome of a run with a threshold."""

    threshold: float
    """``inf`` for no clipping."""
    loss: float
    """The final loss; ``inf`` if the run failed."""
    history: History


def search(run: Callable[[Sequence[float]], Sequence[Outcome]]) -> list[Outcome]:
    """Run without clipping, then with the advice from that run, and with neighbors until they are worse.

    Args:
        run: runs with each of the given thresholds; returns fewer outcomes if it was interrupted.

    Returns:
        The outcomes, in the order of the runs; at most eight.
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
        thresholds = [two_digits(best.threshold / _FACTOR)] if best is clipped[0] else []
        thresholds += [two_digits(best.threshold * _FACTOR)] if best is clipped[-1] else []
    return outcomes


def _start(history: History) -> float:
    """The advice from the run without clipping; else its median norm; else 1."""
    advised = history.suggest().max_norm
    middle = history.summary().quantiles.get(0.5, 0.0)
    return advised or two_digits(middle) or 1.0


def _around(threshold: float) -> list[float]:
    return [threshold, two_digits(threshold / _FACTOR), two_digits(threshold * _FACTOR)]
