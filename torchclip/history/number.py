"""The fixed threshold that suits a run, and what fixed thresholds would have clipped."""

from __future__ import annotations

import math

import numpy as np

from torchclip.history.notes import CONVERGES
from torchclip.history.run import LEAST_STEPS, LEAST_USABLE, Run, counted
from torchclip.history.signs import Array

SHARES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5)
"""The shares of clipped steps for which the table has a threshold."""

# With few steps before an explosion, the threshold is this part of their norms' lower quartile.
_PART_OF_FEW = 1 / 3
# Norms hardly vary if 99 % of them are below this many times the median.
_HARDLY_VARY = 1.3
# Of a run that converges, this many steps are its beginning.
_BEGINNING = 25


def best(run: Run) -> tuple[float, str]:
    """The threshold to use, with two digits, and the reason."""
    usual, bad = run.found[~run.is_spike], run.found[run.is_spike]
    if run.has_left:
        return _before_departure(usual)
    low, high = np.quantile(usual, [0.01, 0.99])
    hardly_varies = high < _HARDLY_VARY * np.median(usual) < _HARDLY_VARY**2 * low
    if len(bad):
        above = min(2 * usual.max(), math.sqrt(usual.max() * bad.min())) if hardly_varies else high
        max_norm = two_digits(_for_drift(run, usual, 0.99, above))
        spike = "the spike" if len(bad) == 1 else f"the {len(bad):,} spikes"
        others = counted(int((usual > max_norm).sum()), "other step")
        return max_norm, (
            f"Use max_norm={max_norm:g}. It would have clipped {spike} and {others} of {len(run.found):,}."
        )
    if hardly_varies and not run.drifts:
        max_norm = two_digits(2 * usual.max())
        return max_norm, (
            f"Clipping is not needed: the norms hardly vary ({usual.min():.3g} to {usual.max():.3g}), and a "
            f"lower threshold only shortens steps. As a safeguard use max_norm={max_norm:g}, twice the "
            "largest."
        )
    max_norm = two_digits(_for_drift(run, usual, 0.9, float(np.quantile(usual, 0.9))))
    if run.drifts:
        clipped = np.mean(run.norms[run.finite] > max_norm)
        return max_norm, (
            f"Use max_norm={max_norm:g}. It would have clipped {clipped:.1%} of the steps of the whole run."
        )
    lower, upper = np.quantile(usual, [0.25, 0.75])
    nearby = " Any number between half and twice that should work as well." if upper < 4 * lower else ""
    return max_norm, (
        f"Use max_norm={max_norm:g}. It would have clipped {np.mean(usual > max_norm):.0%} of the steps "
        f"and protects against a bad batch.{nearby}"
    )


def _for_drift(run: Run, usual: Array, quantile: float, threshold: float) -> float:
    """If the norms drift, a threshold at which neither the first steps nor the last ones are too short."""
    if not run.drifts:
        return threshold
    quarters = np.array_split(usual, 4)
    threshold = max(threshold, float(np.quantile(quarters[-1], quantile)))
    first, last = np.median(quarters[0]), np.median(quarters[-1])
    if last < first:
        # Of a run that converges, most of the first tenth may be too late.
        most = _BEGINNING if last < first / CONVERGES else len(run.norms)
        early = run.norms[: max(min(len(run.norms) // 10, most), 1)]
        early = early[np.isfinite(early) & (early > 0)]
        threshold = max(threshold, float(np.median(early)) if len(early) else 0.0)
    return threshold


def _before_departure(usual: Array) -> tuple[float, str]:
    """The threshold for a run whose norms have left their usual range, from the steps before."""
    few = len(usual) < LEAST_STEPS
    # If there are few steps, the last one may belong to what follows.
    norm = float(np.quantile(usual, 0.25, method="lower") if few else np.median(usual))
    max_norm = two_digits(norm * _PART_OF_FEW if few else norm)
    which = "a third of the lower quartile" if few else "the median"
    of = "a third of the norm of the step" if len(usual) == 1 else f"{which} of the {len(usual):,} steps"
    return max_norm, (
        f"Use max_norm={max_norm:g}, {of} before. If the norms leave that range again, lower the learning "
        "rate."
    )


def table(run: Run, max_norm: float) -> dict[float, float]:
    """Share of clipped steps → the threshold that clips them: what is distinct and true of this run.

    Thresholds much lower than ``max_norm``, the one to use, are left out.
    """
    distinct: dict[str, tuple[float, float]] = {}
    for share in SHARES if len(run.found) >= LEAST_USABLE else ():
        norm = float(np.quantile(run.found, 1 - share))
        # Where many norms are the same, no threshold clips such a share.
        clipped = float((run.found > norm).mean())
        is_true = abs(clipped - share) <= max(1 / len(run.found), share / 4)
        if is_true and share * len(run.found) >= 1 and norm > max_norm / CONVERGES:
            distinct.setdefault(f"{norm:.3g}", (share, norm))
    return dict(distinct.values())


def two_digits(value: float) -> float:
    """A number rounded to two digits."""
    return float(f"{value:.2g}")
