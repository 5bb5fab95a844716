"""What every function and threshold must compute, in NumPy alone, to be read together with the book.

The subject is section 6.1.4 of *Deep Learning from Scratch 2* (gradient clipping against the exploding
gradients of an RNN).  All gradients together are one vector ``ĝ``.  If its norm reaches a threshold, the
vector is scaled down to the threshold:

    if ‖ĝ‖ ≥ threshold:   ĝ ← (threshold / ‖ĝ‖) ĝ

``clip_grads`` is the book's function, and the twin of ``torchclip.clip_grad_norm_``.  ``global_norm`` is the
twin of ``torchclip.get_total_norm``.  The other functions that clip are the twins of torchclip's functions
with the same name and a trailing underscore.  The thresholds are the twins of ``torchclip.Percentile``,
``torchclip.ZScore`` and so on.  The tests and the documentation use this package; code that computes with
torch does not.  It is slow and plain on purpose.

Gradients are NumPy arrays of floating or complex dtype.  An array that is listed twice counts once.
Functions that clip modify the arrays in place.  They refuse wrong arguments (integer arrays, read-only
arrays, a negative or NaN threshold) before they change anything.
"""

from torchclip.reference.adagc import adagc_thresholds
from torchclip.reference.adaptive import clip_grad_adaptive
from torchclip.reference.arrays import Array
from torchclip.reference.norm import clip_coefficient, clip_grads, clip_grads_with_norm, global_norm
from torchclip.reference.per_example import clip_per_example
from torchclip.reference.per_parameter import clip_grad_norm_per_parameter
from torchclip.reference.quantile_tracker import quantile_tracker_thresholds
from torchclip.reference.rms import clip_grad_rms
from torchclip.reference.thresholds import percentile_thresholds, rolling_sigma_thresholds, zscore_thresholds
from torchclip.reference.value import clip_grad_value

__all__ = [
    "Array",
    "adagc_thresholds",
    "clip_coefficient",
    "clip_grad_adaptive",
    "clip_grad_norm_per_parameter",
    "clip_grad_rms",
    "clip_grad_value",
    "clip_grads",
    "clip_grads_with_norm",
    "clip_per_example",
    "global_norm",
    "percentile_thresholds",
    "quantile_tracker_thresholds",
    "rolling_sigma_thresholds",
    "zscore_thresholds",
]
