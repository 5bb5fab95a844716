"""How certain ``torchclip bench`` is of a ratio: on a busy machine it shows none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["BUSY", "EXPLANATION", "call_ratio", "doubt_of_steps", "step_ratio", "times"]

MOST_DOUBT = 0.25
"""The largest relative error of a ratio that is shown.  On an idle machine it is at most 0.1."""

BUSY = "busy"
EXPLANATION = (
    f"{BUSY}: another program used the processor during the measurement, so that the ratio may be wrong by "
    f"more than {MOST_DOUBT:.0%}. Measure again on an idle machine."
)


def step_ratio(row: Mapping[str, Any], name: str) -> float | None:
    """How many times less than torch a contender adds to a step, or None if the machine was busy.

    A busy machine shows in two measurements of a step without clipping that differ, or in two halves of this
    measurement that differ.

    Args:
        row: a row of ``measure_steps``.
        name: the contender.
    """
    ratio: float = row["speedup"][name]
    doubt = max(doubt_of_steps(row), row["drift"][name])
    return ratio if doubt <= MOST_DOUBT * row["added"][name] else None


def doubt_of_steps(row: Mapping[str, Any]) -> float:
    """Seconds by which two measurements of the same step without clipping differ."""
    return abs(float(row["added"]["no clipping again"]))


def call_ratio(result: Mapping[str, Any]) -> float | None:
    """How many times faster than torch a call is, the median, or None if the machine was busy.

    Args:
        result: one contender's in a row of ``measure``; half of the rounds lie between its quartiles.
    """
    first, median, third = map(float, result["speedup"])
    return median if third - first <= 2 * MOST_DOUBT * median else None


def times(ratio: float | None) -> str:
    """A ratio as a text."""
    return BUSY if ratio is None else f"{ratio:.1f}×"
