"""Checks of the numbers that users pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

__all__ = ["at_most", "count", "norm_type_of", "norms", "number", "threshold"]


def norm_type_of(norm_type: float | str) -> float:
    """The order of a norm as a float."""
    if isinstance(norm_type, str) and norm_type not in ("inf", "-inf"):
        raise ValueError(f"`norm_type` must be a number or 'inf', got {norm_type!r}")
    p = float(norm_type) if isinstance(norm_type, str) else number("norm_type", norm_type)
    if math.isnan(p):
        raise ValueError("`norm_type` is nan; pass a number such as 2.0, or 'inf'")
    return p


def threshold(name: str, value: float) -> float:
    """``value`` as a float that is at least 0, ``inf`` included."""
    if not number(name, value) >= 0:
        raise ValueError(f"`{name}` must be at least 0, got {value}")
    return float(value)


def number(name: str, value: Any) -> float:
    """``value`` as a float; strings and bools are not numbers."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        kind = type(value).__name__
        raise ValueError(f"`{name}` must be within the range of float64, got a larger {kind}") from None


def at_most(name: str, value: float, most: float) -> float:
    """``value`` as a float between 0 and ``most``."""
    if not 0 <= number(name, value) <= most:
        raise ValueError(f"`{name}` must be between 0 and {most}, got {value}")
    return float(value)


def count(name: str, value: int, least: int) -> int:
    """``value`` as an integer that is at least ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}")
    return int(value)


def norms(values: Sequence[float]) -> list[float]:
    """The norms of a run as floats."""
    if not isinstance(values, (list, tuple, np.ndarray)):
        raise TypeError(f"`norms` must be a list, a tuple or an array of numbers, got {values!r}")
    return [number("norms", norm) for norm in values]
