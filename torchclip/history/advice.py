"""Which threshold: what a fixed one would have done in a run, and which one to take."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Advice", "advise"]

Array = NDArray[Any]

SHARES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5)
"""The shares of clipped steps that the table gives a threshold for."""

_LEAST_STEPS = 50
# A norm is judged by the medians of so many steps before and after it.
_BESIDE = 25
# A spike is so many standard deviations above it, on a log scale, and at least so many times as large.
_SPIKE_DEVIATIONS, _SPIKE_RATIO = 5.0, 2.0
# The norms drift if the medians of a run's quarters differ by so many standard errors, and by this ratio.
_DRIFT_ERRORS, _DRIFT_RATIO = 6.0, 1.5
# The standard deviation of a normal distribution, in terms of its median absolute deviation.
_DEVIATION_OF_MAD = 1.4826


@dataclass(frozen=True)
class Advice:
    """What a fixed threshold would have done in this run, and which one to take; ``str()`` says it in words.

    The norms are those before clipping, of the steps that are kept and whose norm is finite.  A run that was
    clipped, or clipped otherwise, may have had others.
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
    """What else is to be known: spikes, drift, steps that were not finite; a sentence or two each."""

    def __str__(self) -> str:
        lines = [textwrap.fill(text, 80) for text in (self.reason, *self.notes)]
        if self.table:
            after = f" after the first {self.warmup:,}" if self.warmup else ""
            lines.append(f"On the {self.steps:,} steps{after}, a fixed threshold clips")
            lines += [
                f"  {share:>5.1%} of the steps with max_norm={norm:.3g}" for share, norm in self.table.items()
            ]
        return "\n".join(lines)


def advise(steps: Sequence[int], norms: Sequence[float], earlier: int = 0) -> Advice:
    """The advice for a run.

    Args:
        steps: the numbers of the steps kept, oldest first.
        norms: their norms before clipping, ``inf`` and ``nan`` included.
        earlier: how many steps were before them.
    """
    everything = np.asarray(norms, dtype=np.float64)
    finite = np.isfinite(everything)
    warmup = max(math.ceil((len(everything) + earlier) / 10) - earlier, 0)
    counted = finite & (np.arange(len(everything)) >= warmup)
    found, numbers = everything[counted], np.asarray(steps)[counted]
    nonfinite = len(everything) - int(finite.sum())
    about = [_about_nonfinite(nonfinite)] if nonfinite else []
    refusal = _refusal(int(finite.sum()), found)
    if refusal:
        return Advice(None, {}, 0, False, len(found), warmup, nonfinite, refusal, tuple(about))
    level = _level(found)
    is_spike = _spikes(found / level)
    usual = found[~is_spike]
    quarters, drifts = _quarters(usual)
    max_norm, reason = _recommended(usual, bool(is_spike.any()), drifts)
    if drifts:
        about.insert(0, _about_drift(quarters))
    if is_spike.any():
        about.insert(0, _about_spikes((found / level)[is_spike], numbers[is_spike]))
    thresholds = np.quantile(found, [1 - share for share in SHARES]).tolist()
    table = dict(zip(SHARES, thresholds, strict=True))
    spikes = int(is_spike.sum())
    return Advice(max_norm, table, spikes, drifts, len(found), warmup, nonfinite, reason, tuple(about))


def _refusal(finite: int, found: Array) -> str:
    """Why there is no advice, if there is none."""
    if finite == 0:
        return "No advice: no step had a finite norm."
    if finite < _LEAST_STEPS:
        return f"Too early for advice: {finite} steps had a finite norm, and it takes {_LEAST_STEPS}."
    if not np.quantile(found, 0.9) > 0:
        return "No advice: nearly all norms are 0."
    return ""


def _level(norms: Array) -> Array:
    """The usual norm at each step: the larger one of the medians of the steps before and of those after it.

    A few spikes do not move a median, and where the norms change for good, one side has seen it already.
    """
    width = min(_BESIDE, len(norms))
    medians = np.median(np.lib.stride_tricks.sliding_window_view(norms, width), axis=1)
    at = np.arange(len(norms))
    before, after = (medians[np.clip(first, 0, len(medians) - 1)] for first in (at - width, at + 1))
    level: Array = np.maximum(np.maximum(before, after), np.min(norms[norms > 0]))
    return level


def _spikes(ratios: Array) -> Array:
    """Which steps are spikes, given the ratios of their norms to what is usual there."""
    logs = _logs(ratios)
    limit = max(math.log(_SPIKE_RATIO), _SPIKE_DEVIATIONS * _deviation(logs))
    is_spike: Array = logs > limit
    return is_spike


def _quarters(norms: Array) -> tuple[list[float], bool]:
    """The median norm of each quarter of the run, and whether they differ by more than chance has it."""
    logs = _logs(norms)
    medians = [float(np.median(part)) for part in np.array_split(logs, 4)]
    # The standard error of the median of as many numbers as a quarter has.
    error = 1.2533 * _deviation(logs - _logs(_level(norms))) / math.sqrt(len(norms) / 4)
    drifts = max(medians) - min(medians) > max(math.log(_DRIFT_RATIO), _DRIFT_ERRORS * error)
    return [math.exp(median) for median in medians], drifts


def _logs(positive: Array) -> Array:
    """Logarithms; a 0 counts as the smallest number that is none."""
    logs: Array = np.log(np.maximum(positive, np.min(positive[positive > 0])))
    return logs


def _deviation(logs: Array) -> float:
    """The standard deviation, from the median so that what is far out does not count."""
    return _DEVIATION_OF_MAD * float(np.median(np.abs(logs - np.median(logs))))


def _recommended(usual: Array, spikes: bool, drifts: bool) -> tuple[float, str]:
    """The threshold to take, with two digits, and why."""
    lately = np.array_split(usual, 4)[-1] if drifts else usual
    max_norm = float(f"{np.quantile(lately, 0.99 if spikes else 0.9):.2g}")
    where = "in the last quarter of the run" if drifts else "of this run"
    if spikes:
        return max_norm, (
            f"Take max_norm={max_norm:g}: above 99 % of the usual norms {where}, it shortens the spikes and "
            "hardly any other step."
        )
    return max_norm, (
        f"Take max_norm={max_norm:g}: it shortens the longest tenth of the steps {where} and is a safeguard "
        "against a bad one. From half to twice that number should do as well."
    )


def _about_spikes(ratios: Array, steps: Array) -> str:
    largest = int(np.argmax(ratios))
    return (
        f"The spikes: {_counted(len(ratios))}, up to {ratios[largest]:.3g} times the norm around them "
        f"(step {steps[largest]:,}). torchclip.ZScore() pulls back spikes alone."
    )


def _about_drift(quarters: Sequence[float]) -> str:
    medians = ", ".join(f"{median:.3g}" for median in quarters)
    return (
        f"The norms drift: the medians of the four quarters are {medians}. A threshold that follows, such as "
        "torchclip.Percentile(10), fits better than a number."
    )


def _about_nonfinite(count: int) -> str:
    return (
        f"Not finite: the norm of {_counted(count)}, which no threshold mends; "
        "Clipper(..., nonfinite='skip') leaves such steps out."
    )


def _counted(steps: int) -> str:
    return f"{steps:,} {'step' if steps == 1 else 'steps'}"
