"""Clipping each gradient by its root mean square."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torchclip.reference import checks
from torchclip.reference.arrays import Array, check_arrays, norm_of, scale

__all__ = ["clip_grad_rms"]


def clip_grad_rms(grads: Sequence[Array], max_rms: float) -> list[float]:
    r"""Clip each gradient by itself, in place, to a root mean square of at most ``max_rms``.

        rms(g) = sqrt( Σ_elements g² / n )        g ← min(1, max_rms / rms(g)) g

    Twin of ``torchclip.clip_grad_rms_``.  Returns the root mean squares before clipping, in the order of the
    distinct gradients.

    Examples:
        >>> import numpy as np
        >>> clip_grad_rms([np.array([3.0, 4.0, 0.0, 0.0]), np.array([0.5])], max_rms=1.0)
        [2.5, 0.5]
    """
    max_rms = checks.threshold("max_rms", max_rms)
    grads = check_arrays(grads, writeable=True)
    found = []
    for grad in grads:
        root = math.sqrt(max(1, grad.size))
        rms = norm_of([grad], 2.0) / root
        if math.isinf(rms):  # the norm has overflowed, but perhaps the root mean square fits
            rms = norm_of([grad * 2.0**-64], 2.0) / root * 2.0**64
        # Unlike clipping by norm, this adds no 1e-6.  An infinite threshold only measures.
        if not (rms <= max_rms or math.isinf(max_rms)):
            scale([grad], max_rms / rms)
        found.append(rms)
    return found
