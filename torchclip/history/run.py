"""What the records of a run show, step by step: which steps count, and what is unusual about them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from torchclip.history.records import Record
from torchclip.history.signs import Array, departure, drift, spikes

LEAST_STEPS = 50
"""With fewer steps there is no advice."""
LEAST_USABLE = 8
"""With fewer steps there are neither spikes nor a table."""
MUCH = 0.05
"""What concerns this share of the steps comes before the advice."""
# The first steps, at most half of a run: norms that change in them do not drift.
_START = 100


class Run:
    """What is known about a run.

    Args:
        records: a record for each kept step, oldest first.
        earlier: the number of steps before them.

    Attributes:
        records: the records.
        numbers: the number of each step.
        norms: the norm of each step before clipping.
        losses: the loss of each step; ``nan`` where unknown, ``inf`` where not finite.
        finite: which norms are finite.
        nonfinite: the number of the others.
        zeros: the number of norms that are 0.
        departure: where the norms left their usual range for good, or None.
        has_left: whether they did, and the loss did not stay low: then later steps do not count.
        warmup: the number of kept steps that are too early to count.
        counted: the indices of the steps that count.
        found: their norms.
        is_spike: which of these are spikes.
        quarters: the median norms of the quarters of the run after its start; none if there are few steps.
        drifts: whether these drift.
    """

    def __init__(self, records: Sequence[Record], earlier: int) -> None:
        self.records = records
        self.numbers = np.array([record.step for record in records], dtype=np.int64)
        self.norms = np.array([record.total_norm for record in records], dtype=np.float64)
        self.losses = np.array([_known(record.loss) for record in records], dtype=np.float64)
        self.finite = np.isfinite(self.norms)
        self.nonfinite = len(self.norms) - int(self.finite.sum())
        self.zeros = int((self.norms == 0).sum())
        self.departure = departure(self.norms, self.losses)
        self.has_left = self.departure is not None and self.departure.loss_rose is not False
        end = self.departure.index if self.departure is not None and self.has_left else len(records)
        self.warmup = max(math.ceil((end + earlier) / 10) - earlier, 0)
        if self.has_left and end < LEAST_STEPS:
            self.warmup = 0
        self.usable = self.finite & (self.norms > 0)
        self.counted = self.warmup + np.flatnonzero(self.usable[self.warmup : end])
        self.found = self.norms[self.counted]
        enough = len(self.found) >= LEAST_USABLE
        self.is_spike = spikes(self.found) if enough else np.zeros(len(self.found), dtype=bool)
        start = max(min(_START, (end + earlier) // 2) - earlier, self.warmup)
        self._find_drift(
            self.counted >= start, enough and not (self.has_left and len(self.found) < LEAST_STEPS)
        )

    def _find_drift(self, after_start: Array, enough: bool) -> None:
        """With and without the spikes."""
        self.quarters: list[float] = []
        self.drifts = False
        if enough and after_start.sum() >= LEAST_USABLE:
            self.quarters, self.drifts = drift(self.found[after_start])
            usual = self.found[after_start & ~self.is_spike]
            if self.drifts and len(usual) < after_start.sum():
                self.quarters, self.drifts = drift(usual)


def _known(loss: float | None) -> float:
    """A loss; infinite if it is not finite, ``nan`` if it is not known."""
    if loss is None:
        return math.nan
    return loss if math.isfinite(loss) else math.inf


def counted(number: int, noun: str) -> str:
    """A number with its noun: ``2 steps``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
