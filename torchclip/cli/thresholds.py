"""The thresholds that options choose between."""

from __future__ import annotations

import math

import torchclip
from torchclip.thresholds.base import MaxNorm

__all__ = ["LEARNED", "WITHOUT_CEILING", "max_norm_of"]

LEARNED = {
    "percentile": "the 10th percentile of the norms so far (AutoClip)",
    "zscore": "what is usual, and only spikes are above it (ZClip)",
    "adagc": "what is usual for each parameter on its own (AdaGC)",
    "rolling-sigma": "mean plus six standard deviations of the last norms",
}
"""The thresholds that learn from the norms, and to what they clip."""

WITHOUT_CEILING = {"rolling-sigma"}
"""Those that have no use for a ``max_norm``."""


def max_norm_of(threshold: str, max_norm: float = math.inf) -> MaxNorm:
    """What to pass as ``max_norm`` to a Clipper: a new object for each.

    Args:
        threshold: ``"fixed"`` or a name in ``LEARNED``.
        max_norm: the fixed threshold, or a ceiling for one that learns; for AdaGC that of its warm-up. A
            rolling sigma has none.
    """
    if threshold == "percentile":
        return torchclip.Percentile(10, max_norm=max_norm)
    if threshold == "zscore":
        return torchclip.ZScore(max_norm=max_norm)
    if threshold == "adagc":
        return torchclip.AdaGC() if math.isinf(max_norm) else torchclip.AdaGC(max_norm=max_norm)
    if threshold == "rolling-sigma":
        return torchclip.RollingSigma()
    return max_norm
