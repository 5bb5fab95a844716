"""Thresholds that follow the run: they depend on the norms so far."""

from torchclip.thresholds.adagc import AdaGC
from torchclip.thresholds.base import MaxNorm, Threshold
from torchclip.thresholds.percentile import Percentile
from torchclip.thresholds.quantile_tracker import QuantileTracker
from torchclip.thresholds.rolling_sigma import RollingSigma
from torchclip.thresholds.zscore import ZScore

__all__ = ["AdaGC", "MaxNorm", "Percentile", "QuantileTracker", "RollingSigma", "Threshold", "ZScore"]
