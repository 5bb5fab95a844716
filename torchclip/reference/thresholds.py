"""Thresholds that follow the norms of a run, for all its steps at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from torchclip.reference import checks
from torchclip.reference.arrays import Array

__all__ = ["percentile_thresholds", "rolling_sigma_thresholds", "zscore_thresholds"]


def percentile_thresholds(
    norms: Sequence[float],
    percentile: float = 10.0,
    window: int | None = None,
    warmup: int = 0,
    max_norm: float = math.inf,
) -> Array:
    r"""AutoClip's threshold for every step of a run: a percentile of the norms so far.

    ``H_t`` are the finite norms up to and including the step's own, or the last ``window`` of them:

        threshold_t = min(percentile of H_t, max_norm)

    The threshold is ``max_norm`` until there are ``warmup`` finite norms.  Twin of ``torchclip.Percentile``,
    which describes the arguments.  Returns the thresholds as float64, of shape ``(len(norms),)``.

    References:
        Seetharaman, Wichern, Pardo and Le Roux, *AutoClip: Adaptive Gradient Clipping for Source Separation
        Networks*, 2020, https://arxiv.org/abs/2007.14469

    Examples:
        >>> percentile_thresholds([1.0, 3.0, 100.0, math.nan], percentile=50.0)
        array([1., 2., 3., 3.])
    """
    norms = checks.norms(norms)
    percentile = checks.at_most("percentile", percentile, 100)
    window = None if window is None else checks.count("window", window, 1)
    warmup = checks.count("warmup", warmup, 0)
    max_norm = checks.threshold("max_norm", max_norm)
    thresholds = np.full(len(norms), max_norm)
    history: list[float] = []
    for t, norm in enumerate(norms):
        warm = len(history) >= warmup
        if math.isfinite(norm):
            history.append(norm)
        if warm and history:
            latest = history if window is None else history[-window:]
            thresholds[t] = min(float(np.percentile(latest, percentile)), max_norm)
    return thresholds


def zscore_thresholds(
    norms: Sequence[float],
    alpha: float = 0.97,
    threshold: float = 2.5,
    warmup: int = 25,
    clip_option: str = "adaptive_scaling",
    skip_update_on_spike: bool = False,
    max_norm: float = math.inf,
) -> Array:
    r"""ZClip's threshold for every step of a run: it clips spikes above the z-score ``threshold``.

    Mean ``μ`` and variance ``σ²`` start as those of the first ``warmup`` finite norms.  Then, in each step:

        z = (g - μ) / σ
        if z > threshold:  g ← μ + (threshold² / z) σ    ("adaptive_scaling")
                           g ← μ                         ("mean")
                           g ← μ + threshold σ           ("percentile")
        μ  ← alpha μ  + (1 - alpha) g
        σ² ← alpha σ² + (1 - alpha) (g - μ)²

    The step's threshold is the new ``g`` for a spike and ``μ + threshold σ`` otherwise, ``max_norm`` in the
    warm-up, and never more than ``max_norm``.  Twin of ``torchclip.ZScore``, which describes the arguments.
    Returns the thresholds as float64, of shape ``(len(norms),)``.

    References:
        Kumar, Owen, Chowdhury and Güra, *ZClip: Adaptive Spike Mitigation for LLM Pre-Training*, 2025,
        https://arxiv.org/abs/2504.02507

    Examples:
        >>> zscore_thresholds([1.0, 3.0, 10.0], threshold=2.0, warmup=2)
        array([inf, inf, 2.5])
    """
    norms = checks.norms(norms)
    alpha = checks.at_most("alpha", alpha, 1)
    threshold = checks.threshold("threshold", threshold)
    warmup = checks.count("warmup", warmup, 1)
    if not isinstance(clip_option, str) or clip_option not in ("adaptive_scaling", "mean", "percentile"):
        raise ValueError(
            f"`clip_option` must be 'adaptive_scaling', 'mean' or 'percentile', got {clip_option!r}"
        )
    max_norm = checks.threshold("max_norm", max_norm)
    thresholds = np.full(len(norms), max_norm)
    first: list[float] = []
    mean = var = 0.0
    for t, norm in enumerate(norms):
        if len(first) < warmup:
            if math.isfinite(norm):
                first.append(norm)
                mean, var = float(np.mean(first)), float(np.var(first))
            continue
        std = math.sqrt(var)
        limit = mean + threshold * std
        spike = math.isfinite(norm) and norm > limit
        if spike and clip_option == "adaptive_scaling":
            # threshold²/z · σ, rearranged so that no spike divides by zero.
            limit = mean + threshold**2 * var / (norm - mean)
        elif spike and clip_option == "mean":
            limit = mean
        thresholds[t] = min(limit, max_norm)
        if math.isfinite(norm) and not (spike and skip_update_on_spike):
            g = limit if spike else norm
            mean = alpha * mean + (1 - alpha) * g
            var = alpha * var + (1 - alpha) * (g - mean) ** 2
    return thresholds


def rolling_sigma_thresholds(
    norms: Sequence[float], sigma: float = 6.0, window: int = 128, warmup: int = 64
) -> Array:
    r"""The mean of the last norms plus some standard deviations, for every step of a run.

    ``W`` are the last ``window`` finite norms before the step that were not above the thresholds of their
    steps:

        threshold = mean(W) + sigma std(W)        std(W)² = Σ (g - mean(W))² / (|W| - 1)

    The threshold is ``inf`` until there are ``warmup`` of these norms.  Twin of ``torchclip.RollingSigma``,
    which describes the arguments.  Returns the thresholds as float64, of shape ``(len(norms),)``.

    Examples:
        >>> rolling_sigma_thresholds([1.0, 2.0, 3.0, 100.0, 2.0], sigma=2.0, warmup=3)
        array([inf, inf, inf,  4.,  4.])
    """
    norms = checks.norms(norms)
    sigma = checks.threshold("sigma", sigma)
    window = checks.count("window", window, 2)
    warmup = checks.count("warmup", warmup, 2)
    thresholds = np.full(len(norms), math.inf)
    history: list[float] = []
    for t, norm in enumerate(norms):
        if len(history) >= warmup:
            latest = history[-window:]
            thresholds[t] = np.mean(latest) + sigma * np.std(latest, ddof=1)
        if math.isfinite(norm) and norm <= thresholds[t]:
            history.append(norm)
    return thresholds
