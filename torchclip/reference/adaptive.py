"""Clipping relative to the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from torchclip.reference import checks
from torchclip.reference.arrays import Array, check_arrays, norm_of, scale, wide

__all__ = ["clip_grad_adaptive"]

_SMALL = 2.0**-64


def clip_grad_adaptive(
    weights: Sequence[Array],
    grads: Sequence[Array],
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    norm_type: float | str = 2.0,
) -> None:
    r"""Adaptive gradient clipping: each unit's gradient relative to the norm of the unit's own weights.

    For the ``i``-th unit (row, output channel) of every weight ``W`` with gradient ``G``:

        limit_i = clip_factor · max(‖W_i‖, eps)
        if ‖G_i‖ > limit_i:   G_i ← (limit_i / ‖G_i‖) G_i

    The units of an array with two or more axes are its slices along the first axis.  A vector or a scalar is
    one unit.  Twin of ``torchclip.clip_grad_adaptive_``, which describes the other arguments.

    Args:
        weights: the parameters' values; not modified.
        grads: their gradients, of the same shapes; modified in place.

    References:
        Brock, De, Smith and Simonyan, *High-Performance Large-Scale Image Recognition Without Normalization*,
        2021, section 4, https://arxiv.org/abs/2102.06171

    Examples:
        >>> grad = np.array([[3.0, 4.0], [0.3, 0.4]])
        >>> clip_grad_adaptive([np.array([[6.0, 8.0], [6.0, 8.0]])], [grad], clip_factor=0.1)
        >>> np.round(grad, 4)
        array([[0.6, 0.8], [0.3, 0.4]])
    """
    p = checks.norm_type_of(norm_type)
    clip_factor = checks.threshold("clip_factor", clip_factor)
    eps = checks.threshold("eps", eps)
    check_arrays(weights, writeable=False, name="weights")
    check_arrays(grads, writeable=True)
    if len(weights) != len(grads):
        raise ValueError(
            f"`weights` and `grads` must be of the same length, got {len(weights)} and {len(grads)}"
        )
    for weight, grad in zip(weights, grads, strict=True):
        if weight.shape != grad.shape:
            raise ValueError(f"a gradient of shape {grad.shape} does not fit its weight of {weight.shape}")
    distinct = {(id(w), id(g)): (w, g) for w, g in zip(weights, grads, strict=True)}
    for weight, grad in distinct.values():
        units = [()] if grad.ndim < 2 else list(np.ndindex(grad.shape[0]))
        for unit in units:
            limit = clip_factor * max(norm_of([weight[unit]], p), eps)
            norm = norm_of([grad[unit]], p)
            if math.isinf(max(norm, limit)):  # a norm has overflowed, but perhaps no element is infinite
                limit = clip_factor * max(norm_of([_small(weight[(*unit, ...)])], p), eps * _SMALL)
                norm = norm_of([_small(grad[(*unit, ...)])], p)
            if not norm <= limit:
                # A norm of 0 gets here only if the limit is NaN.
                scale([grad[(*unit, ...)]], limit / norm if norm else limit)


def _small(unit: Array) -> Array:
    """A copy in float64, multiplied by a power of two: only the ratio of two norms counts."""
    copy = wide(unit)
    scale([copy], _SMALL)
    return copy
