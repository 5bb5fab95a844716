"""The thresholds that options offer."""

from __future__ import annotations

from collections.abc import Callable

import torchclip
from torchclip.thresholds.base import Threshold

__all__ = ["CLASSES"]

CLASSES: dict[str, Callable[..., Threshold]] = {
    "percentile": torchclip.Percentile,
    "zscore": torchclip.ZScore,
    "adagc": torchclip.AdaGC,
    "rolling-sigma": torchclip.RollingSigma,
}
"""The thresholds that learn from the norms."""
