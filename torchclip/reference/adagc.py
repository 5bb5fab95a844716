"""AdaGC: a threshold for each parameter at every step of a run."""

from __future__ import annotations

import math

import numpy as np

from torchclip.reference import checks
from torchclip.reference.arrays import Array, norm_of

__all__ = ["adagc_thresholds"]


def adagc_thresholds(
    norms: Array,
    relative: float = 1.05,
    beta: float = 0.98,
    warmup: int = 100,
    max_norm: float = 1.0,
    norm_type: float | str = 2.0,
) -> Array:
    r"""AdaGC's threshold for each parameter at every step of a run.

    In the warm-up all gradients together are clipped to ``max_norm``, and ``γ_i`` is the smallest clipped
    norm of parameter ``i`` so far.  After the warm-up:

        threshold_i = relative γ_i        γ_i ← beta γ_i + (1 - beta) min(‖g_i‖, threshold_i)

    A norm that is 0 or not finite does not change ``γ_i``, and does not count in the warm-up of its
    parameter.  A norm that is not finite does not count in the joint norm either.  Twin of
    ``torchclip.AdaGC``, which describes the other arguments.

    Args:
        norms: the norm of each parameter's gradient at each step, of shape ``(steps, parameters)``; negative
            where there is no gradient.
        norm_type: the order of the norms.

    Returns:
        The thresholds, of the shape of ``norms``, float64; NaN where there is no gradient.

    References:
        Wang et al., *AdaGC: Improving Training Stability for Large Language Model Pretraining*, 2025,
        https://arxiv.org/abs/2502.11034

    Examples:
        >>> import numpy as np
        >>> adagc_thresholds(np.array([[2.0], [8.0], [100.0]]), 1.5, 0.5, warmup=2, max_norm=4.0)
        array([[2.],
               [4.],
               [3.]])
    """
    p = checks.norm_type_of(norm_type)
    relative, max_norm = checks.threshold("relative", relative), checks.threshold("max_norm", max_norm)
    beta = checks.at_most("beta", beta, 1)
    warmup = checks.count("warmup", warmup, 1)
    norms = np.asarray(norms, dtype=np.float64)
    if norms.ndim != 2:
        raise ValueError(f"`norms` must be of shape (steps, parameters), got {norms.shape}")
    thresholds = np.full(norms.shape, math.nan)
    gamma, seen = np.full(norms.shape[1], math.inf), np.zeros(norms.shape[1], dtype=int)
    for of_step, limits in zip(norms, thresholds, strict=True):
        there = of_step[np.isfinite(of_step) & (of_step >= 0)]
        joint = norm_of([there], p)
        rate = 1.0 if joint <= max_norm else max_norm / joint
        for i, norm in enumerate(of_step):
            if norm < 0:
                continue
            warming_up = seen[i] < warmup
            if not warming_up:
                limits[i] = relative * gamma[i]
            else:
                limits[i] = rate * norm if math.isfinite(norm) else max_norm
            if 0 < norm < math.inf:
                clipped = min(norm, limits[i])
                gamma[i] = min(gamma[i], clipped) if warming_up else beta * gamma[i] + (1 - beta) * clipped
                seen[i] += 1
    return thresholds
