"""A threshold for per-example clipping that follows a quantile."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from torchclip.reference import checks
from torchclip.reference.arrays import Array

__all__ = ["quantile_tracker_thresholds"]


def quantile_tracker_thresholds(
    shares: Sequence[float], quantile: float = 0.5, lr: float = 0.2, max_norm: float = 0.1
) -> Array:
    r"""The threshold after each batch, given the share of its examples that were not clipped.

        max_norm ← max_norm exp(-lr (share - quantile))

    Twin of ``torchclip.QuantileTracker``, which describes the other arguments.  Returns the thresholds as
    float64, of shape ``(len(shares),)``.

    References:
        Andrew, Thakkar, McMahan and Ramaswamy, *Differentially Private Learning with Adaptive Clipping*,
        2021, https://arxiv.org/abs/1905.03871

    Examples:
        >>> quantile_tracker_thresholds([0.5, 1.0, 0.5, 0.0]).round(4)
        array([0.1   , 0.0905, 0.0905, 0.1   ])
    """
    shares = checks.norms(shares)
    quantile, lr = checks.at_most("quantile", quantile, 1), checks.threshold("lr", lr)
    thresholds = np.zeros(len(shares))
    for t, share in enumerate(shares):
        max_norm = checks.threshold("max_norm", max_norm) * math.exp(-lr * (share - quantile))
        thresholds[t] = max_norm
    return thresholds
