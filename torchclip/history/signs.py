"""What the norms and losses of a run show: spikes, drift, and norms that left their usual range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# The number of steps before and after a norm whose medians judge it.
_BESIDE = 25
# A spike is this many standard deviations above the median, on a log scale, and this many times as large.
_SPIKE_DEVIATIONS, _SPIKE_RATIO = 5.0, 2.0
# Norms drift if the medians of a run's quarters differ by this many standard errors, and by this ratio, as
# those of norms that double from the first step to the last: a threshold works nearly as well at half or
# twice its value.  In few steps, training still begins.  No chance makes quarters differ by the last ratio.
_DRIFT_ERRORS, _DRIFT_RATIO, _MORE_THAN_CHANCE = 6.0, 2**0.75, 100.0
_FEW_FOR_DRIFT, _DRIFT_RATIO_OF_FEW = 100, 3.0
_SHORT_BLOCK, _MOST_BLOCKS = 3, 24
# Norms leave their usual range if they are this many standard deviations above it, and this many times as
# large: more if there are few steps before.
_LEAVES_DEVIATIONS, _LEAVES_RATIOS = 5.0, ((10, 10.0), (3, 100.0), (1, 1000.0))
_USUAL = 0.95  # the share of earlier norms in the range
# They do not return if this share of the following norms is outside, and there are this many of them.
_SHARE_OUTSIDE, _LEAST_AFTER = 0.8, 5
# If the loss is this many times as high in the next steps, and stays higher, it is enough that norms are this
# many times as large in these steps, and this many standard deviations above.  Norms that grow later do not
# show that both are one event: in reinforcement learning the loss changes with the data.
_SOON, _LOSS_RATIO, _RATIO_WITH_LOSS, _HARDLY_ANY = 10, 1.3, 3.0, 0.02
# Infinite losses count as this, as quantiles take differences, and infinities have none.
_HIGHEST_LOSS = 1e300
# The standard deviation of a normal distribution, divided by its median absolute deviation.
_DEVIATION_OF_MAD = 1.4826


def usual_level(norms: Array) -> Array:
    """The usual norm at each step: the larger of the medians of the steps before and after it.

    A few spikes do not change a median, and if the norms change permanently, one side shows it already.
    """
    width = min(_BESIDE, len(norms))
    medians = np.median(np.lib.stride_tricks.sliding_window_view(norms, width), axis=1)
    at = np.arange(len(norms))
    before, after = (medians[np.clip(first, 0, len(medians) - 1)] for first in (at - width, at + 1))
    # The first steps have fewer before them: norms that fall from the start are no spikes.
    before[:width] = [norms[0], *(np.median(norms[:i]) for i in range(1, width))]
    level: Array = np.maximum(before, after)
    return level


def spikes(norms: Array) -> Array:
    """Which steps are spikes: far above the usual norm, and above nine tenths of the norms around them."""
    logs = np.log(norms / usual_level(norms))
    width = min(4 * _BESIDE + 1, len(norms))
    upper = np.quantile(np.lib.stride_tricks.sliding_window_view(norms, width), 0.9, axis=1)
    around = upper[np.clip(np.arange(len(norms)) - width // 2, 0, len(upper) - 1)]
    least = max(math.log(_SPIKE_RATIO), _SPIKE_DEVIATIONS * _deviation(logs))
    found: Array = (logs > least) & (norms > _SPIKE_RATIO * around)
    return found


def drift(norms: Array) -> tuple[list[float], bool]:
    """The median norm of each quarter of the run, and whether they differ by more than chance.

    The norms follow a line or have one step; what remains in the medians of short blocks is chance.  If the
    remainder of one block tells that of the next, the blocks say as little as fewer independent ones.
    """
    logs = np.log(norms)
    quarters = [float(np.median(quarter)) for quarter in np.array_split(logs, 4)]
    change = max(quarters) - min(quarters)
    blocks = min(len(logs) // _SHORT_BLOCK, _MOST_BLOCKS)
    medians = np.array([np.median(block) for block in np.array_split(logs, max(blocks, 8))])
    rest = _rest(medians)
    variance = float(rest @ rest) / (len(rest) - 2)
    # What follows a line or a step that was fitted to few blocks seems to remember less than it does.
    follows = float(rest[1:] @ rest[:-1]) / max(float(rest @ rest), 1e-300)
    follows = min(max((follows + 3 / len(rest)) / (1 - 6 / len(rest)), 0.0), 0.97)
    independent = len(rest) / 4 * (1 - follows) / (1 + follows)
    error = math.sqrt(2 * variance / independent)
    ratio = _DRIFT_RATIO if len(norms) >= _FEW_FOR_DRIFT else _DRIFT_RATIO_OF_FEW
    drifts = change > max(math.log(ratio), min(_DRIFT_ERRORS * error, math.log(_MORE_THAN_CHANCE)))
    return [math.exp(median) for median in quarters], drifts


def _rest(values: Array) -> Array:
    """What remains of values without a line, or a single step, whichever explains more."""
    at = np.arange(len(values))
    found = [values - np.polyval(np.polyfit(at, values, 1), at)]
    for step in range(2, len(values) - 1):
        means = np.where(at < step, values[:step].mean(), values[step:].mean())
        found.append(values - means)
    return min(found, key=lambda rest: float(rest @ rest))


@dataclass(frozen=True)
class Departure:
    """Norms that left their usual range and did not return.

    Attributes:
        index: the first step outside, counted from the beginning of the data.
        before: the median norm before.
        after: the median norm since then; ``inf`` if most were not finite.
        loss_before: the median loss just before, if known.
        loss_after: the median loss since then.
    """

    index: int
    before: float
    after: float
    loss_before: float | None = None
    loss_after: float | None = None

    @property
    def loss_rose(self) -> bool | None:
        """Whether the loss rose and stayed high; None if it is not known."""
        if self.loss_before is None or self.loss_after is None:
            return None
        return not self.loss_after <= self.loss_before


def departure(norms: Array, losses: Array) -> Departure | None:
    """Where the norms left their usual range and did not return, from norms and losses, or None.

    Args:
        norms: of each step; ``inf`` and ``nan`` are outside every range.
        losses: of each step, ``nan`` where unknown.
    """
    finite = np.isfinite(norms)
    # A run that ends with its explosion may have few steps.
    has_ended = len(norms) > _LEAST_AFTER and not (finite[-1] and losses[-1] != math.inf)
    if (len(norms) < 2 * _LEAST_AFTER and not has_ended) or not (norms[finite] > 0).any():
        return None
    highest = math.log(norms[finite].max()) + 2 * math.log(_LEAVES_RATIOS[-1][1])
    logs = np.full(len(norms), highest)
    positive = finite & (norms > 0)
    logs[positive] = np.log(norms[positive])
    logs[norms == 0] = logs[positive].min()
    found = [index for index in (_by_norms(logs), _by_losses(logs, losses)) if index is not None]
    # A usual range takes norms above 0.
    found = [index for index in found if positive[:index].any()]
    if not found:
        return None
    index = min(found)
    before, after = (float(np.exp(np.median(part))) for part in (logs[:index], logs[index:]))
    after = math.inf if np.median(logs[index:]) >= highest else after
    known = np.isfinite(losses[:index])
    if not known.any() or np.isnan(losses[index:]).all():
        return Departure(index, before, after)
    loss_after = np.where(np.isnan(losses[index:]), math.inf, losses[index:])
    loss_before = float(np.median(losses[:index][known][-_BESIDE:]))
    return Departure(index, before, after, loss_before, float(np.median(loss_after)))


def _by_norms(logs: Array) -> int | None:
    """The first step outside, from the norms alone."""
    steps = len(logs)
    at = np.arange(1, steps - _LEAST_AFTER + 1)
    # The best split into two parts with different means, and splits that are dense at the start, because
    # norms that grow step by step have no such split.
    sums = np.cumsum(logs - logs.mean())[at - 1]
    best = at[np.argmin(sums / np.sqrt(at * (steps - at)))]
    splits = {int(best), *np.geomspace(1, at[-1], 25).astype(int).tolist()}
    found = (_leaves_for_good(logs, split) for split in splits)
    return min((index for index in found if index is not None), default=None)


def _leaves_for_good(logs: Array, split: int) -> int | None:
    """The first step outside the range of the steps before a split, if most of the following are outside."""
    before = logs[:split]
    deviation = _LEAVES_DEVIATIONS * _deviation(before)
    ratio = next(ratio for least, ratio in _LEAVES_RATIOS if split >= least)
    upper = max(np.median(before) + max(deviation, math.log(ratio)), np.quantile(before, _USUAL))
    # The best end, where a step inside costs as much as four steps outside gain.
    inside_costs = _SHARE_OUTSIDE / (1 - _SHARE_OUTSIDE)
    gains = np.cumsum(np.where(logs > upper, 1.0, -inside_costs)[::-1])[::-1]
    index = int(np.argmax(gains))
    lately = logs[index:][-max((len(logs) - index) // 4, _LEAST_AFTER) :] > upper
    stays = gains[index] >= _LEAST_AFTER and lately.mean() >= _SHARE_OUTSIDE
    is_new = index >= split and np.mean(logs[:index] > upper) <= 1 - _USUAL
    return index if stays and is_new else None


def _by_losses(logs: Array, losses: Array) -> int | None:
    """The step from which the loss stays higher and the norms larger."""
    if not np.isfinite(losses).any():
        return None
    filled = _filled(losses)
    least = max(math.log(_RATIO_WITH_LOSS), _RATIO_WITH_LOSS * _deviation(np.diff(logs)) / math.sqrt(2))
    for index in range(1, len(filled) - _LEAST_AFTER + 1):
        beside = slice(max(index - _BESIDE, 0), index)
        highest = filled[beside].max()
        if not filled[index] > highest:
            continue
        soon = slice(index, index + _SOON)
        rose = np.median(filled[soon]) > highest + (_LOSS_RATIO - 1) * abs(highest)
        grown = max(np.median(logs[index : index + steps]) for steps in (_SOON, 2 * _BESIDE))
        growth = grown - np.median(logs[beside])
        stays = np.median(filled[index:]) > highest and growth > least
        # If hardly any later loss is as low as any before, less growth is enough.
        is_new = np.quantile(filled[index:], _HARDLY_ANY) > filled[:index].max()
        if rose and (stays or (is_new and growth > max(least / 2, math.log(2)))):
            return index
    return None


def _filled(losses: Array) -> Array:
    """The losses as finite numbers; an unknown one is replaced by the last known one."""
    known = np.flatnonzero(~np.isnan(losses))
    last = np.searchsorted(known, np.arange(len(losses)), side="right") - 1
    return losses[known[np.maximum(last, 0)]].clip(-_HIGHEST_LOSS, _HIGHEST_LOSS)


def harmful(at: Array, losses: Array) -> int | None:
    """After how many of these steps the loss was higher; None if it is not known.

    It is higher if the median of the five steps after is above all of the ten before.

    Args:
        at: the steps, counted from the beginning of the losses.
        losses: of all steps, ``nan`` where unknown.
    """
    if not np.isfinite(losses).any():
        return None
    filled, count = _filled(losses), 0
    for place in at:
        before = filled[max(place - 2 * _LEAST_AFTER, 0) : place + 1]
        after = filled[place + 1 : place + 1 + _LEAST_AFTER]
        count += bool(len(after) and not np.median(after) <= before.max())
    # Of the last step it is not known.
    return None if count == 0 and at[-1] == len(losses) - 1 else count


def final_loss(losses: Sequence[float]) -> float:
    """The mean of the last tenth of the losses, ``nan`` if there are none."""
    return float(np.mean(losses[-max(len(losses) // 10, 1) :])) if len(losses) else math.nan


def _deviation(logs: Array) -> float:
    """The standard deviation, from the median, so that a few outliers do not matter."""
    return _DEVIATION_OF_MAD * float(np.median(np.abs(logs - np.median(logs))))
