"""A run in a few numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from torchclip._core import arguments
from torchclip.history.records import Record, integer

_QUANTILES = (0.1, 0.5, 0.9, 0.99)


class Counts(NamedTuple):
    """What is known of all steps of a run, also of those whose records are no longer kept."""

    steps: int = 0
    clipped: int = 0
    nonfinite: int = 0
    skipped: int = 0
    largest_norm: float = math.nan
    largest_step: int | None = None
    latest: tuple[int | None, bool, bool, bool] = (None, False, False, False)
    """The latest step, and whether any of its records was clipped, non-finite, skipped."""

    def after(self, records: Iterable[Record]) -> Counts:
        """The counts with further records; those with the same number are of one step."""
        steps, clipped, nonfinite, skipped, largest_norm, largest_step, latest = self
        last, was_clipped, was_nonfinite, was_skipped = latest
        for step, norm, _, _, is_clipped, is_nonfinite, is_skipped, *_ in records:
            if step != last:
                steps, last = steps + 1, step
                was_clipped = was_nonfinite = was_skipped = False
            if is_clipped and not was_clipped:
                clipped, was_clipped = clipped + 1, True
            if is_skipped and not was_skipped:
                skipped, was_skipped = skipped + 1, True
            if is_nonfinite:
                nonfinite, was_nonfinite = nonfinite + (not was_nonfinite), True
            elif not norm <= largest_norm:
                largest_norm, largest_step = norm, step
        latest = last, was_clipped, was_nonfinite, was_skipped
        return Counts(steps, clipped, nonfinite, skipped, largest_norm, largest_step, latest)

    def state_dict(self) -> dict[str, Any]:
        """The counts as plain data."""
        return {name: value for name, value in self._asdict().items() if name != "latest"}

    @staticmethod
    def loaded(state: Any, records: Sequence[Record]) -> Counts:
        """The counts of a ``state_dict`` and of the records that were kept; an error names what is wrong."""
        numbers = ("steps", "clipped", "nonfinite", "skipped")
        arguments.saved("state['counts']", state, [*numbers, "largest_norm", "largest_step"], "History")
        counts = {
            name: arguments.count(f"state['counts']['{name}']", state[name], least=0) for name in numbers
        }
        norm = arguments.number("state['counts']['largest_norm']", state["largest_norm"])
        at = state["largest_step"]
        step = None if at is None else integer("state['counts']['largest_step']", at)
        latest = Counts().after(record for record in records if record.step == records[-1].step).latest
        return Counts(**counts, largest_norm=norm, largest_step=step, latest=latest)


@dataclass(frozen=True)
class Summary:
    """A run in a few numbers; ``str()`` prints them in two lines, or three if steps were clipped.

    Counts and the largest norm are over all steps, quantiles over the last ``kept`` steps.  A step with
    several records counts once: as clipped, non-finite or skipped if any of them is.
    """

    steps: int
    clipped: int
    nonfinite: int
    skipped: int
    largest_norm: float
    """The largest finite norm; ``nan`` if there is none."""
    largest_step: int | None
    """The step with the largest norm; the first one if there are several."""
    kept: int
    quantiles: dict[float, float]
    """Quantiles of the finite norms before clipping of the kept steps, by probability; empty without any."""
    clipped_quantiles: dict[float, float]
    """The same of the norms after clipping."""

    @property
    def clipped_share(self) -> float:
        """The share of clipped steps; 0 without steps."""
        return self.clipped / self.steps if self.steps else 0.0

    def __str__(self) -> str:
        counts = (
            f"{self.steps:,} steps: {self.clipped:,} clipped ({self.clipped_share:.1%}), "
            f"{self.nonfinite:,} non-finite, {self.skipped:,} skipped"
        )
        if not self.quantiles:
            return f"{counts}\nnorm: none finite among the steps kept"
        where = "" if self.kept == self.steps else f" (last {self.kept:,} steps)"
        largest = f"largest {self.largest_norm:.4g} at step {self.largest_step}"
        text = f"{counts}\nnorm: {_listed(self.quantiles)}{where}; {largest}"
        if self.clipped_quantiles == self.quantiles:
            return text
        return f"{text}\nafter clipping: {_listed(self.clipped_quantiles)}"


def summary_of(counts: Counts, records: Sequence[Record]) -> Summary:
    """The summary of all steps, and of the records that are kept."""
    return Summary(
        *counts[:6],
        kept=len({record.step for record in records}),
        quantiles=_quantiles(record.total_norm for record in records),
        clipped_quantiles=_quantiles(record.clipped_norm for record in records),
    )


def _listed(quantiles: dict[float, float]) -> str:
    return ", ".join(f"{q:.0%} {norm:.4g}" for q, norm in quantiles.items())


def _quantiles(values: Iterable[float]) -> dict[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    return dict(zip(_QUANTILES, np.quantile(finite, _QUANTILES).tolist(), strict=True)) if finite else {}
