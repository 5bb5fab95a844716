"""Gradient clipping for PyTorch."""

from torchclip import reference
from torchclip.clip_grad.clip import (
    clip_grad_adaptive_,
    clip_grad_norm_,
    clip_grad_norm_per_parameter_,
    clip_grad_value_,
    clip_grads_with_norm_,
    clip_per_example,
    get_total_norm,
)
from torchclip.clipper.clipper import Clipper
from torchclip.patch import install, installed, uninstall
from torchclip.thresholds.base import Threshold
from torchclip.thresholds.percentile import Percentile
from torchclip.thresholds.zscore import ZScore

__version__ = "0.1.0"

__all__ = [
    "Clipper",
    "Percentile",
    "Threshold",
    "ZScore",
    "clip_grad_adaptive_",
    "clip_grad_norm_",
    "clip_grad_norm_per_parameter_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "clip_per_example",
    "get_total_norm",
    "install",
    "installed",
    "reference",
    "uninstall",
]
