"""Thresholds that follow the run."""

from torchclip.thresholds.thresholds import MaxNorm, Percentile, Threshold, ZScore

__all__ = ["MaxNorm", "Percentile", "Threshold", "ZScore"]
