"""What every clipper must compute, in NumPy only, written to be read beside the book."""

from torchclip.reference.reference import (
    Array,
    clip_coefficient,
    clip_grad_adaptive,
    clip_grad_norm_per_parameter,
    clip_grad_value,
    clip_grads,
    clip_grads_with_norm,
    clip_per_example,
    global_norm,
    percentile_thresholds,
    zscore_thresholds,
)

__all__ = [
    "Array",
    "clip_coefficient",
    "clip_grad_adaptive",
    "clip_grad_norm_per_parameter",
    "clip_grad_value",
    "clip_grads",
    "clip_grads_with_norm",
    "clip_per_example",
    "global_norm",
    "percentile_thresholds",
    "zscore_thresholds",
]
