"""What the threshold of a run did, and whether to keep it."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

from torchclip.history.run import Run, counted
from torchclip.history.signs import Array
from torchclip.history.stalls import Stall

Verdict = Literal["keep", "clips_every_step", "never_clips", "in_the_way", "too_high", "unknown"]

# Every step is clipped if these shares of the steps are: of all, and if the threshold is not near the advice.
_EVERY, _MOST = 0.9, 0.5
_FEW = 0.1
# It never clips if it is above this many times the largest norm; below, it protects against a bad batch.
_FAR_ABOVE = 5
# With several thresholds, the norm after clipping is not the product with the smallest coefficient.
_SAME_NORM = 0.01


class Used(NamedTuple):
    """The threshold that a run is judged by."""

    low: float
    """The smallest and the largest threshold of a step."""
    high: float
    clipped: Array
    """Which steps it clipped, or would have clipped."""
    to: float
    """To which part of their norm it clipped them, in the median."""
    is_joint: bool
    """Whether it is one number, for the norm of all gradients."""

    @property
    def is_number(self) -> bool:
        """Whether it is the same in each step."""
        return self.low == self.high

    @property
    def name(self) -> str:
        """What a sentence calls it."""
        if self.is_number:
            return f"max_norm={self.low:g}"
        return f"the threshold ({self.low:.3g} to {self.high:.3g})"


def used(run: Run, max_norm: float | None) -> Used | None:
    """The threshold of the records, or another one, ``max_norm``, on their norms; None without any."""
    if max_norm is not None:
        clipped = run.usable & (run.norms > max_norm)
        to = float(np.median(max_norm / run.norms[clipped])) if clipped.any() else 1.0
        return Used(max_norm, max_norm, clipped, to, True)
    thresholds = [record.max_norm for record in run.records if math.isfinite(record.max_norm)]
    if not thresholds:
        return None
    by_it = [record for record in run.records if record.clipped and not record.nonfinite]
    is_product = all(
        math.isclose(record.clipped_norm, record.total_norm * record.clip_coef, rel_tol=_SAME_NORM)
        for record in by_it
    )
    low, high = min(thresholds), max(thresholds)
    to = float(np.median([record.clip_coef for record in by_it])) if by_it else 1.0
    clipped = run.usable & np.array([record.clipped for record in run.records], dtype=bool)
    return Used(low, high, clipped, to, low == high and is_product)


def judge(run: Run, threshold: Used, advised: float, reason: str, stall: Stall) -> tuple[Verdict, float, str]:
    """The verdict on a threshold, the number to use, and the reason.

    ``advised`` is the number that the norms of the run suggest, for a ``reason``.
    """
    share = float(threshold.clipped.sum() / max(run.usable.sum(), 1))
    # What the threshold is compared with: one number, and the norm of all gradients.
    is_near = threshold.is_joint and advised / 2 <= threshold.low <= 2 * advised
    named = f"{threshold.name[0].upper()}{threshold.name[1:]}" if not threshold.is_number else threshold.name
    if stall.matters and threshold.high < advised:
        remedy = f"Use max_norm={advised:g}, or lower eps below {stall.size:.0g}."
        return "in_the_way", advised, f"{named} is in the way: {stall}. {remedy}"
    if share >= _EVERY or (share > _MOST and not is_near and not run.has_left):
        kept = threshold.low if threshold.is_number else advised
        return "clips_every_step", kept, f"{named} {_clips_most(run, threshold, share, advised)}"
    if run.has_left:
        if advised < threshold.high:
            return "too_high", advised, f"{named} did not keep the norms in their range. {reason}"
        return (
            "unknown",
            advised,
            (
                f"{named} did not keep the norms in their range, and the steps before suggest no lower one "
                f"({advised:g}): lower the learning rate."
            ),
        )
    largest = float(run.found[~run.is_spike].max())
    if not threshold.clipped.any() and threshold.high > _FAR_ABOVE * max(largest, advised):
        norms = f"the largest norm of {counted(len(run.norms), 'step')} is {run.norms[run.usable].max():.3g}"
        return "never_clips", advised, f"{named} never clips: {norms}. {reason}"
    kept = threshold.low if threshold.is_joint else advised
    return "keep", kept, f"Keep {threshold.name}: {_why_keep(run, threshold, share, is_near, advised)}."


def _clips_most(run: Run, threshold: Used, share: float, advised: float) -> str:
    """What it means that most steps are clipped, and what would change."""
    which = "every step" if share == 1 else f"{share:.0%} of the steps"
    clips = f"clips {which}, the median one to {threshold.to:.2g} times its norm."
    unusual = f"To clip unusual batches alone, use about max_norm={advised:g}."
    if share < _EVERY:
        return f"{clips} So it shortens most steps, not only those of unusual batches. {unusual}"
    clips += (
        " So all batches count alike, and the learning rate alone sets how far a step goes. If that is "
        "meant, as in PPO, keep it."
    )
    if run.has_left:
        return f"{clips} If the run failed when the norms left their range, lower the learning rate."
    return f"{clips} {unusual} Large gradients then count more."


def _why_keep(run: Run, threshold: Used, share: float, is_near: bool, advised: float) -> str:
    if not threshold.clipped.any():
        return "it clips no step of this run, and protects against a bad batch"
    clips = f"it clips {threshold.clipped.sum():,} of {run.usable.sum():,} steps"
    if share <= _FEW:
        return f"{clips}, and protects against a bad batch"
    if is_near:
        return f"{clips}, and is between half and twice what the norms suggest, {advised:g}"
    return f"{clips}, and nothing in this run speaks against it"
