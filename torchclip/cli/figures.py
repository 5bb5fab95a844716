"""What the figures of the commands share.

Figures are made as objects, without ``pyplot``: no window, no global state, nothing to close.  matplotlib
comes with the ``demo`` extra and is imported where a figure is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

__all__ = ["Array", "steps"]

Array = NDArray[Any]


def steps(values: Sequence[float] | Array) -> range:
    """The numbers of the steps, from 1."""
    return range(1, len(values) + 1)
