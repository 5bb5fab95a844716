"""Which threshold: what a fixed one would have done in a run, and which one to take."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from torchclip.history.records import Record
from torchclip.history.signs import (
    Array,
    Departure,
    departure,
    drift,
    harmful,
    rises,
    spikes,
    usual_level,
)
from torchclip.history.stalls import ClippedSizes, Stall

__all__ = ["Advice", "advise"]

SHARES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5)
"""The shares of clipped steps that the table gives a threshold for."""

_LEAST_STEPS = 50
# With fewer steps before an explosion, the threshold is this part of their median norm.
_PART_OF_FEW = 1 / 3
# Norms hardly vary if all but a hundredth are below this many times the median.
_HARDLY_VARY = 1.3
# Notes that come before the recommendation if they concern this share of the steps.
_MUCH = 0.05


@dataclass(frozen=True)
class Advice:
    """What a fixed threshold would have done in this run, and which one to take; ``str()`` says it in words.

    The norms are those before clipping, of the steps that are kept and whose norm is finite; of a step with
    several records, as of LBFGS, the first.  A run that was clipped, or clipped otherwise, may have had
    others.
    """

    max_norm: float | None
    """The threshold to take, with two digits; None if there are too few steps to tell."""
    table: dict[float, float]
    """Share of steps clipped → the ``max_norm`` that does it; empty if there are too few steps to tell."""
    spikes: int
    """How many steps had a norm far above those of the steps around them."""
    drifts: bool
    """Whether the norms of a part of the run are larger than those of another, not by chance."""
    steps: int
    """How many steps all this rests on."""
    warmup: int
    """How many of the steps kept do not count, as the first tenth of a run is no measure for the rest."""
    nonfinite: int
    """How many of the steps kept had a norm that is not finite; they do not count either."""
    reason: str
    """Why this ``max_norm``, or why none."""
    notes: tuple[str, ...]
    """What else to know: steps that were not finite, explosion, drift, spikes; a sentence or two each."""
    explodes: int | None = None
    """The number of the step at which the norms left their usual range for good, or None."""
    stalls: float = 0.0
    """The share of steps whose clipped gradients are below the optimizer's ``eps``, and so move little."""
    rises: dict[float, tuple[float, float]] = field(default_factory=dict)
    """Share of steps clipped → how often the loss rose after these steps, and after the others, if known."""
    first: int = 0
    """How many of the notes to read before the reason."""

    @property
    def words(self) -> list[str]:
        """The reason and the notes, what matters most first."""
        return [*self.notes[: self.first], self.reason, *self.notes[self.first :]]

    @property
    def rows(self) -> dict[float, float]:
        """The rows of the table that are at least one step."""
        return {share: norm for share, norm in self.table.items() if share * self.steps >= 1}

    @property
    def lines(self) -> list[str]:
        """All of it, one line for each thing."""
        lines = self.words
        if self.rows:
            after = f" after the first {self.warmup:,}" if self.warmup else ""
            lines.append(f"On the {self.steps:,} steps{after}, a fixed threshold clips")
        for share, norm in self.rows.items():
            row = f"  {share:>5.1%} of the steps with max_norm={norm:.3g}"
            if share in self.rises:
                above, below = self.rises[share]
                row += f"; the loss rose after {above:.0%} of them, {below:.0%} of the others"
            lines.append(row)
        return lines

    def __str__(self) -> str:
        return "\n".join(
            textwrap.fill(line, 80, subsequent_indent="    " if line.startswith(" ") else "")
            for line in self.lines
        )


def advise(records: Sequence[Record], earlier: int, clipped_sizes: ClippedSizes) -> Advice:
    """The advice for a run.

    Args:
        records: the records kept, oldest first.
        earlier: how many steps were before them.
        clipped_sizes: how large clipped gradients were beside the optimizer's ``eps``.
    """
    firsts = [record for i, record in enumerate(records) if i == 0 or record.step != records[i - 1].step]
    return _Run(firsts, earlier, clipped_sizes.stall(firsts)).advice()


class _Run:
    """What is known of a run, and what is said about it."""

    def __init__(self, records: Sequence[Record], earlier: int, stall: Stall) -> None:
        self.numbers = np.array([record.step for record in records], dtype=np.int64)
        self.norms = np.array([record.total_norm for record in records], dtype=np.float64)
        self.losses = np.array(
            [math.nan if record.loss is None else _known(record.loss) for record in records], dtype=np.float64
        )
        self.finite = np.isfinite(self.norms)
        self.nonfinite = len(self.norms) - int(self.finite.sum())
        self.departure = departure(self.norms, self.losses)
        self.stall = stall
        self.warmup = max(math.ceil((len(self.norms) + earlier) / 10) - earlier, 0)
        end = len(self.norms)
        if self.departure is not None and self.departure.loss_rose is not False:
            end = self.departure.index
            self.warmup = min(self.warmup, max(math.ceil((end + earlier) / 10) - earlier, 0))
            if end < _LEAST_STEPS:
                self.warmup = 0
        usable = self.finite & (self.norms > 0)
        self.counted = np.flatnonzero(usable & (np.arange(len(self.norms)) >= self.warmup))
        self.counted = self.counted[self.counted < end]
        self.zeros = int((self.norms == 0).sum())

    def advice(self) -> Advice:
        """All of it."""
        notes = [*self._about_nonfinite(), *self._about_departure()]
        first = len(notes) if self.departure or self.nonfinite >= _MUCH * len(self.norms) else 0
        found = self.norms[self.counted]
        refusal = self._refusal()
        quarters, drifts = ([], False) if len(found) < 8 else drift(found)
        if refusal:
            return self._advice(None, refusal, notes, first, False, 0, {}, {})
        is_spike = spikes(found) if len(found) >= 8 else np.zeros(len(found), dtype=bool)
        if is_spike.any():
            quarters, drifts_without = drift(found[~is_spike])
            drifts = drifts and drifts_without
        if self.departure is not None and self.departure.loss_rose is not False:
            drifts = drifts and len(found) >= _LEAST_STEPS
        if drifts:
            about = self._about_drift(quarters)
            notes.append(about)
            first = len(notes)
        notes += [*self._about_stalls(), *self._about_zeros()]
        if is_spike.any():
            notes.append(self._about_spikes(found / usual_level(found), is_spike))
        max_norm, reason = self._recommended(found[~is_spike], int(is_spike.sum()), drifts)
        table, rose = self._table(found)
        return self._advice(max_norm, reason, notes, first, drifts, int(is_spike.sum()), table, rose)

    def _advice(
        self,
        max_norm: float | None,
        reason: str,
        notes: Sequence[str],
        first: int,
        drifts: bool,
        spike_count: int,
        table: dict[float, float],
        rose: dict[float, tuple[float, float]],
    ) -> Advice:
        explodes = None if self.departure is None else int(self.numbers[self.departure.index])
        return Advice(
            max_norm,
            table,
            spike_count,
            drifts,
            len(self.counted),
            self.warmup,
            self.nonfinite,
            reason,
            tuple(notes),
            explodes,
            self.stall.share,
            rose,
            first,
        )

    def _table(self, found: Array) -> tuple[dict[float, float], dict[float, tuple[float, float]]]:
        thresholds = np.quantile(found, [1 - share for share in SHARES]).tolist()
        table = dict(zip(SHARES, thresholds, strict=True))
        rose = {share: rises(found, self.losses[self.counted], norm) for share, norm in table.items()}
        return table, {share: pair for share, pair in rose.items() if pair is not None}

    def _refusal(self) -> str:
        """Why there is no advice, if there is none."""
        finite = int(self.finite.sum())
        if finite == 0:
            return "No advice: no step had a finite norm. Lower the learning rate to a tenth, and ask again."
        if self.departure is not None and self.departure.loss_rose is not False:
            return ""
        if finite < _LEAST_STEPS:
            return f"Too early for advice: {finite} steps had a finite norm, and it takes {_LEAST_STEPS}."
        if len(self.counted) <= _MUCH * len(self.norms):
            return "No advice: nearly all norms are 0."
        if len(self.counted) < 8:
            return f"No advice: only {len(self.counted)} steps after the first tenth had a norm above 0."
        return ""

    def _recommended(self, usual: Array, spike_count: int, drifts: bool) -> tuple[float, str]:
        """The threshold to take, with two digits, and why."""
        found = self.norms[self.counted]
        if self.departure is not None and self.departure.loss_rose is not False:
            return self._before_departure(usual)
        if not spike_count and not drifts and np.quantile(usual, 0.99) < _HARDLY_VARY * np.median(usual):
            safe = _two_digits(2 * usual.max())
            return safe, (
                "Clipping is not needed: the norms hardly vary "
                f"({usual.min():.3g} to {usual.max():.3g}), and a lower threshold would only shorten steps. "
                f"As a safeguard use max_norm={safe:g}, twice the largest."
            )
        quantile = 0.99 if spike_count else 0.9
        threshold = float(np.quantile(usual, quantile))
        if drifts:
            quarters = np.array_split(usual, 4)
            threshold = max(threshold, float(np.quantile(quarters[-1], quantile)))
            if np.median(quarters[-1]) < np.median(quarters[0]):  # early steps need theirs
                early = self.norms[: max(len(self.norms) // 10, 1)]
                early = early[np.isfinite(early) & (early > 0)]
                threshold = max(threshold, float(np.median(early)) if len(early) else 0.0)
        max_norm = _two_digits(threshold)
        clipped = np.mean((self.norms[np.isfinite(self.norms)] if drifts else found) > max_norm)
        if spike_count:
            others = int((usual > max_norm).sum())
            spike = "the spike" if spike_count == 1 else f"the {spike_count:,} spikes"
            return max_norm, (
                f"Use max_norm={max_norm:g}. It would have clipped {spike} and "
                f"{_counted(others, 'other step')} of {len(found):,}."
            )
        if drifts:
            return max_norm, f"Use max_norm={max_norm:g}. It would have clipped {clipped:.1%} of the steps."
        return max_norm, (
            f"Use max_norm={max_norm:g}. It would have clipped {clipped:.0%} of the steps and protects "
            "against a bad batch. From half to twice that number should do as well."
        )

    def _before_departure(self, usual: Array) -> tuple[float, str]:
        """The threshold for a run whose norms have left their usual range, from before that."""
        middle = float(np.median(usual))
        few = len(usual) < _LEAST_STEPS
        max_norm = _two_digits(middle * _PART_OF_FEW if few else middle)
        what = "a third of the median norm" if few else "the median norm"
        return max_norm, (
            f"Use max_norm={max_norm:g}, {what} of the {_counted(len(usual), 'step')} before. If the norms "
            "leave that range again, lower the learning rate."
        )

    # Notes

    def _about_nonfinite(self) -> Iterator[str]:
        if self.nonfinite:
            yield (
                f"Not finite: the norm of {_counted(self.nonfinite, 'step')} of {len(self.norms):,}. No "
                "threshold helps there; Clipper(..., nonfinite='skip') skips such steps."
            )

    def _about_departure(self) -> Iterator[str]:
        found = self.departure
        if found is None:
            return
        step = int(self.numbers[found.index])
        times = (
            "not finite" if math.isinf(found.after) else f"{found.after / found.before:.3g} times as large"
        )
        text = (
            f"At step {step:,} the norms left their usual range for good: the median norm since then is "
            f"{found.after:.3g}, {times}; before it was {found.before:.3g}."
        )
        yield text + _loss_words(found)

    def _about_drift(self, quarters: Sequence[float]) -> str:
        medians = ", ".join(f"{median:.3g}" for median in quarters)
        text = f"The norms drift: the medians of the four quarters are {medians}."
        if quarters[-1] < quarters[0] / 100:
            return f"{text} The run converges; a threshold that follows, as Percentile does, stops it early."
        return (
            f"{text} A threshold that follows, such as torchclip.Percentile(10), fits better than a number."
        )

    def _about_stalls(self) -> Iterator[str]:
        if self.stall.matters:
            yield str(self.stall)

    def _about_zeros(self) -> Iterator[str]:
        if self.zeros:
            zeros = _counted(self.zeros, "step")
            yield f"The norm of {zeros} of {len(self.norms):,} is 0; these do not count."

    def _about_spikes(self, ratios: Array, is_spike: Array) -> str:
        at = np.flatnonzero(is_spike)
        largest = at[np.argmax(ratios[at])]
        text = (
            f"The spikes: {_counted(len(at), 'step')}, up to {ratios[largest]:.3g} times the norm around "
            f"them (step {self.numbers[self.counted[largest]]:,})."
        )
        bad = harmful(at, self.losses[self.counted])
        if bad is not None:
            none = "it" if len(at) == 1 else "any of them"
            text += (
                f" The loss rose after {bad:,} of them."
                if bad
                else f" They did no harm: the loss did not rise after {none}."
            )
        return f"{text} torchclip.ZScore() clips spikes alone."


def _known(loss: float) -> float:
    """A loss; one that is not finite is as large as can be."""
    return loss if math.isfinite(loss) else math.inf


def _loss_words(found: Departure) -> str:
    if found.loss_before is None or found.loss_after is None:
        return ""
    if found.loss_rose:
        return f" The loss rose from {found.loss_before:.3g} to {found.loss_after:.3g}."
    losses = f"{found.loss_before:.3g}, then {found.loss_after:.3g}"
    return f" The loss did not rise ({losses}), so the change may be meant."


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
