"""Gradient clipping for PyTorch."""

from torchclip import kernel, reference
from torchclip.clip_grad.adaptive import Adaptive, clip_grad_adaptive_
from torchclip.clip_grad.norm import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from torchclip.clip_grad.per_example import clip_per_example
from torchclip.clip_grad.per_parameter import clip_grad_norm_per_parameter_
from torchclip.clip_grad.rms import BlockRMS, clip_grad_rms_
from torchclip.clip_grad.value import Value, clip_grad_value_
from torchclip.clipper.clipper import Clipper
from torchclip.patch import install, installed, uninstall
from torchclip.ranks_report.report import check_ranks
from torchclip.thresholds.adagc import AdaGC
from torchclip.thresholds.base import Threshold
from torchclip.thresholds.percentile import Percentile
from torchclip.thresholds.quantile_tracker import QuantileTracker
from torchclip.thresholds.rolling_sigma import RollingSigma
from torchclip.thresholds.zscore import ZScore

__version__ = "0.1.0"

__all__ = [
    "AdaGC",
    "Adaptive",
    "BlockRMS",
    "Clipper",
    "Percentile",
    "QuantileTracker",
    "RollingSigma",
    "Threshold",
    "Value",
    "ZScore",
    "check_ranks",
    "clip_grad_adaptive_",
    "clip_grad_norm_",
    "clip_grad_norm_per_parameter_",
    "clip_grad_rms_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "clip_per_example",
    "get_total_norm",
    "install",
    "installed",
    "kernel",
    "reference",
    "uninstall",
]
