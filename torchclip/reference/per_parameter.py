"""Clipping each gradient by its own norm."""

from __future__ import annotations

from collections.abc import Sequence

from torchclip.reference import checks
from torchclip.reference.arrays import Array, check_arrays, norm_of, scale
from torchclip.reference.norm import clip_coefficient

__all__ = ["clip_grad_norm_per_parameter"]


def clip_grad_norm_per_parameter(
    grads: Sequence[Array], max_norm: float, norm_type: float | str = 2.0
) -> list[float]:
    """Clip each gradient to ``max_norm`` by itself, in place.

    Twin of ``torchclip.clip_grad_norm_per_parameter_``.  Returns the norms before clipping, in the order of
    the distinct gradients.

    Examples:
        >>> import numpy as np
        >>> clip_grad_norm_per_parameter([np.array([3.0, 4.0]), np.array([0.5])], max_norm=1.0)
        [5.0, 0.5]
    """
    p = checks.norm_type_of(norm_type)
    max_norm = checks.threshold("max_norm", max_norm)
    grads = check_arrays(grads, writeable=True)
    norms = [norm_of([g], p) for g in grads]
    for grad, norm in zip(grads, norms, strict=True):
        scale([grad], clip_coefficient(max_norm, norm))
    return norms
