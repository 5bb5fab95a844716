"""Thresholds that follow the run: the norms seen so far decide where to clip."""

from torchclip.thresholds.base import MaxNorm, Threshold
from torchclip.thresholds.percentile import Percentile
from torchclip.thresholds.zscore import ZScore

__all__ = ["MaxNorm", "Percentile", "Threshold", "ZScore"]
