"""Which threshold to use: what a fixed threshold would have done in a run, and the one to use."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

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

SHARES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5)
"""The shares of clipped steps for which the table has a threshold."""

_LEAST_STEPS = 50
# With fewer steps, norms have neither drift nor spikes.
_LEAST_USABLE = 8
# With few steps before an explosion, the threshold is this part of their norms' lower quartile.
_PART_OF_FEW = 1 / 3
# Norms hardly vary if 99 % of them are below this many times the median.
_HARDLY_VARY = 1.3
# A run converges if its last norms are this many times smaller than its first ones.
_CONVERGES, _BEGINNING = 100, 25
# Notes that come before the recommendation if they concern this share of the steps.
_MUCH = 0.05


@dataclass(frozen=True)
class Advice:
    """What a fixed threshold would have done in this run, and which one to use; ``str()`` says it in words.

    It uses the norms before clipping, of those kept steps whose norm is finite; of a step with several
    records, such as those of LBFGS, the first.  With another threshold, the run may have had other norms.
    """

    max_norm: float | None
    """The threshold to use, with two digits; None if there are too few steps."""
    table: dict[float, float]
    """Share of clipped steps → the ``max_norm`` that clips them; empty if there are too few steps."""
    spikes: int
    """The number of steps whose norm was far above those of the steps around them."""
    drifts: bool
    """Whether the norms of one part of the run are larger than those of another, by more than chance."""
    steps: int
    """The number of steps on which the advice is based."""
    warmup: int
    """The number of kept steps that do not count: the first tenth of a run, which is not typical."""
    nonfinite: int
    """The number of kept steps whose norm is not finite; they do not count either."""
    reason: str
    """The reason for this ``max_norm``, or for none."""
    notes: tuple[str, ...]
    """Other observations: steps that were not finite, explosion, drift, spikes; a sentence or two each."""
    explodes: int | None = None
    """The number of the step at which the norms left their usual range and did not return, or None."""
    stalls: float = 0.0
    """The share of steps whose clipped gradients are below the optimizer's ``eps``: they change little."""
    rises: dict[float, tuple[float, float]] = field(default_factory=dict)
    """Share of clipped steps → how often the loss rose after these steps, and after the others, if known."""
    rows: dict[float, float] = field(default_factory=dict)
    """The rows of the table that ``str()`` shows: distinct, at least one step each, and true of this run."""
    first: int = 0
    """How many of the notes come before the reason."""

    @property
    def words(self) -> list[str]:
        """The reason and the notes, the most important first."""
        return [*self.notes[: self.first], self.reason, *self.notes[self.first :]]

    @property
    def lines(self) -> list[str]:
        """Everything, one line per item."""
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
        records: the kept records, oldest first.
        earlier: the number of steps before them.
        clipped_sizes: the size of clipped gradients, compared with the optimizer's ``eps``.
    """
    firsts = [record for i, record in enumerate(records) if i == 0 or record.step != records[i - 1].step]
    return _Run(firsts, earlier, clipped_sizes.stall(firsts)).advice()


class _Run:
    """What is known about a run, and the advice for it."""

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
        # What came after does not count then.
        self.has_left = self.departure is not None and self.departure.loss_rose is not False
        if self.departure is not None and self.has_left:
            end = self.departure.index
            self.warmup = min(self.warmup, max(math.ceil((end + earlier) / 10) - earlier, 0))
            if end < _LEAST_STEPS:
                self.warmup = 0
        usable = self.finite & (self.norms > 0)
        self.counted = np.flatnonzero(usable & (np.arange(len(self.norms)) >= self.warmup))
        self.counted = self.counted[self.counted < end]
        self.zeros = int((self.norms == 0).sum())

    def advice(self) -> Advice:
        """The whole advice."""
        notes = [*self._about_nonfinite(), *self._about_departure()]
        if self.zeros >= _MUCH * len(self.norms):
            notes += self._about_zeros()
        is_urgent = self.departure or max(self.nonfinite, self.zeros) >= _MUCH * len(self.norms)
        first = len(notes) if is_urgent else 0
        refusal = self._refusal()
        if refusal:
            return self._advice(None, refusal, notes, first)
        found = self.norms[self.counted]
        is_spike = spikes(found) if len(found) >= _LEAST_USABLE else np.zeros(len(found), dtype=bool)
        quarters, drifts = self._drift(found, is_spike)
        if drifts:
            notes.append(self._about_drift(quarters))
            first = len(notes)
        notes += self._about_stalls()
        if self.zeros < _MUCH * len(self.norms):
            notes += self._about_zeros()
        if is_spike.any():
            notes.append(self._about_spikes(found / usual_level(found), is_spike))
        max_norm, reason = self._recommended(found, is_spike, drifts)
        return self._advice(
            max_norm,
            reason,
            notes,
            first,
            drifts=drifts,
            spikes=int(is_spike.sum()),
            **self._table(found, max_norm),
        )

    def _advice(
        self, max_norm: float | None, reason: str, notes: Sequence[str], first: int, **found: Any
    ) -> Advice:
        fields = {"table": {}, "spikes": 0, "drifts": False, **found}
        return Advice(
            max_norm=max_norm,
            steps=len(self.counted),
            warmup=self.warmup,
            nonfinite=self.nonfinite,
            reason=reason,
            notes=tuple(notes),
            explodes=None if self.departure is None else int(self.numbers[self.departure.index]),
            stalls=self.stall.share,
            first=first,
            **fields,
        )

    def _drift(self, found: Array, is_spike: Array) -> tuple[list[float], bool]:
        """The medians of the quarters, and whether they drift, with and without the spikes."""
        if len(found) < (_LEAST_STEPS if self.has_left else _LEAST_USABLE):
            return [], False
        quarters, drifts = drift(found)
        if is_spike.any():
            quarters, drifts_without = drift(found[~is_spike])
            drifts = drifts and drifts_without
        return quarters, drifts

    def _table(self, found: Array, max_norm: float) -> dict[str, dict[float, Any]]:
        """The fields of the advice that a table shows."""
        thresholds = np.quantile(found, [1 - share for share in SHARES]).tolist()
        table = dict(zip(SHARES, thresholds, strict=True))
        pairs = {share: rises(found, self.losses[self.counted], norm) for share, norm in table.items()}
        rows: dict[str, tuple[float, float]] = {}
        for share, norm in table.items():
            # Where many norms are the same, no threshold clips such a share.
            clipped = float((found > norm).mean())
            is_true = abs(clipped - share) <= max(1 / len(found), share / 4)
            is_worth_it = share * len(found) >= 1 and norm > max_norm / _CONVERGES
            if is_true and is_worth_it and len(found) >= _LEAST_USABLE:
                rows.setdefault(f"{norm:.3g}", (share, norm))
        rose = {share: pair for share, pair in pairs.items() if pair is not None}
        return {"table": table, "rows": dict(rows.values()), "rises": rose}

    def _refusal(self) -> str:
        """Why there is no advice, or None."""
        if not len(self.norms):
            return "No advice: no step has been recorded yet."
        if not self.finite.any():
            return "No advice: no step had a finite norm. Lower the learning rate to a tenth, and ask again."
        if self.has_left:
            return ""
        usable = int((self.finite & (self.norms > 0)).sum())
        if len(self.norms) >= _LEAST_STEPS and usable <= _MUCH * len(self.norms):
            return "No advice: nearly all norms are 0."
        if usable < _LEAST_STEPS:
            what = "a norm above 0" if self.zeros else "a finite norm"
            steps = _counted(usable, "step")
            return f"Too early for advice: {steps} had {what}, and it takes {_LEAST_STEPS}."
        if len(self.counted) < _LEAST_USABLE:
            steps = _counted(len(self.counted), "step")
            return f"No advice: only {steps} after the first tenth had a norm above 0."
        return ""

    def _recommended(self, found: Array, is_spike: Array, drifts: bool) -> tuple[float, str]:
        """The threshold to use, with two digits, and the reason."""
        usual, bad = found[~is_spike], found[is_spike]
        if self.has_left:
            return self._before_departure(usual)
        low, high = np.quantile(usual, [0.01, 0.99])
        hardly_varies = high < _HARDLY_VARY * np.median(usual) < _HARDLY_VARY**2 * low
        if len(bad):
            above = min(2 * usual.max(), math.sqrt(usual.max() * bad.min())) if hardly_varies else high
            max_norm = _two_digits(self._for_drift(usual, 0.99, above) if drifts else above)
            spike = "the spike" if len(bad) == 1 else f"the {len(bad):,} spikes"
            others = _counted(int((usual > max_norm).sum()), "other step")
            return max_norm, (
                f"Use max_norm={max_norm:g}. It would have clipped {spike} and {others} of {len(found):,}."
            )
        if drifts:
            max_norm = _two_digits(self._for_drift(usual, 0.9, float(np.quantile(usual, 0.9))))
            clipped = np.mean(self.norms[self.finite] > max_norm)
            return max_norm, (
                f"Use max_norm={max_norm:g}. It would have clipped {clipped:.1%} of the steps of the whole "
                "run."
            )
        if hardly_varies:
            max_norm = _two_digits(2 * usual.max())
            return max_norm, (
                "Clipping is not needed: the norms hardly vary "
                f"({usual.min():.3g} to {usual.max():.3g}), and a lower threshold would only shorten steps. "
                f"As a safeguard use max_norm={max_norm:g}, twice the largest."
            )
        max_norm = _two_digits(float(np.quantile(usual, 0.9)))
        lower, upper = np.quantile(usual, [0.25, 0.75])
        nearby = " Any number from half to twice that should work as well." if upper < 4 * lower else ""
        return max_norm, (
            f"Use max_norm={max_norm:g}. It would have clipped {np.mean(usual > max_norm):.0%} of the steps "
            f"and protects against a bad batch.{nearby}"
        )

    def _for_drift(self, usual: Array, quantile: float, threshold: float) -> float:
        """A threshold at which neither the first steps nor the last ones are too short."""
        quarters = np.array_split(usual, 4)
        threshold = max(threshold, float(np.quantile(quarters[-1], quantile)))
        first, last = np.median(quarters[0]), np.median(quarters[-1])
        if last < first:
            # Of a run that converges, most of the first tenth may be too late.
            most = _BEGINNING if last < first / _CONVERGES else len(self.norms)
            early = self.norms[: max(min(len(self.norms) // 10, most), 1)]
            early = early[np.isfinite(early) & (early > 0)]
            threshold = max(threshold, float(np.median(early)) if len(early) else 0.0)
        return threshold

    def _before_departure(self, usual: Array) -> tuple[float, str]:
        """The threshold for a run whose norms have left their usual range, from the steps before."""
        few = len(usual) < _LEAST_STEPS
        # If there are few steps, the last one may belong to what follows.
        norm = float(np.quantile(usual, 0.25, method="lower") if few else np.median(usual))
        max_norm = _two_digits(norm * _PART_OF_FEW if few else norm)
        which = "a third of the lower quartile" if few else "the median"
        of = "a third of the norm of the step" if len(usual) == 1 else f"{which} of the {len(usual):,} steps"
        return max_norm, (
            f"Use max_norm={max_norm:g}, {of} before. If the norms leave that range again, lower the "
            "learning rate."
        )

    # Notes

    def _about_nonfinite(self) -> Iterator[str]:
        if not self.nonfinite:
            return
        text = f"Not finite: the norm of {_counted(self.nonfinite, 'step')} of {len(self.norms):,}"
        if self.departure is not None and self.finite[: self.departure.index].all():
            yield f"{text}, after the norms had left their usual range."
        else:
            yield (f"{text}. No threshold helps there; Clipper(..., nonfinite='skip') skips such steps.")

    def _about_departure(self) -> Iterator[str]:
        found = self.departure
        if found is None:
            return
        step = int(self.numbers[found.index])
        after = (
            "most are not finite since then"
            if math.isinf(found.after)
            else f"is {found.after:.3g} since then, {found.after / found.before:.3g} times as large"
        )
        yield (
            f"At step {step:,} the norms left their usual range for good: their median was "
            f"{found.before:.3g} before, and {after}.{_loss_words(found)}"
        )

    def _about_drift(self, quarters: Sequence[float]) -> str:
        medians = ", ".join(f"{median:.3g}" for median in quarters)
        text = f"The norms drift: the medians of the four quarters are {medians}."
        if quarters[-1] < quarters[0] / _CONVERGES:
            return (
                f"{text} The run converges; a threshold that follows the norms, such as Percentile, would "
                "stop it early."
            )
        return (
            f"{text} A threshold that follows the norms, such as torchclip.Percentile(10), fits better than "
            "a number."
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
        if self.counted[at[-1]] == len(self.norms) - 1:
            text += " The last step is one of them: perhaps the run has just exploded."
        bad = harmful(self.counted[at], self.losses)
        if bad is not None:
            none = "it" if len(at) == 1 else "any of them"
            text += (
                f" The loss rose after {bad:,} of them."
                if bad
                else f" They did no harm: the loss did not rise after {none}."
            )
        return f"{text} torchclip.ZScore() clips spikes alone."


def _known(loss: float) -> float:
    """A loss; infinite if it is not finite."""
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
