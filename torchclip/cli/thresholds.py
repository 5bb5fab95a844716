"""The thresholds that options choose between."""

from __future__ import annotations

import math

import torchclip
from torchclip.thresholds.base import MaxNorm

__all__ = ["LEARNED", "max_norm_of"]

LEARNED = {
    "percentile": "the 10th percentile of the norms so far (AutoClip)",
    "zscore": "what is usual, and only spikes are above it (ZClip)",
}
"""The thresholds that learn from the norms, and to what they clip."""


def max_norm_of(threshold: str, max_norm: float = math.inf) -> MaxNorm:
    """What to pass as ``max_norm`` to a Clipper: a new object for each.

    Args:
        threshold: ``"fixed"`` or a name in ``LEARNED``.
        max_norm: the fixed threshold, or a ceiling for one that learns.
    """
    if threshold == "percentile":
        return torchclip.Percentile(10, max_norm=max_norm)
    if threshold == "zscore":
        return torchclip.ZScore(max_norm=max_norm)
    return max_norm
