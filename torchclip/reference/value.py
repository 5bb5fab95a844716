"""Clipping by value: each element by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from torchclip.reference import checks
from torchclip.reference.arrays import Array, check_arrays

__all__ = ["clip_grad_value"]


def clip_grad_value(grads: Sequence[Array], clip_value: float) -> None:
    """Limit every element of real floating arrays to ``[-clip_value, clip_value]``, in place.

    Twin of ``torchclip.clip_grad_value_``.  NaN stays NaN.

    Examples:
        >>> grad = np.array([-3.0, 0.5])
        >>> clip_grad_value([grad], 1.0)
        >>> grad
        array([-1. ,  0.5])
    """
    clip_value = checks.threshold("clip_value", clip_value)
    check_arrays(grads, writeable=True, real=True)
    for grad in grads:
        # A limit beyond the dtype's range limits nothing.
        limit = clip_value if clip_value <= float(np.finfo(grad.dtype).max) else math.inf
        np.clip(grad, -limit, limit, out=grad)
