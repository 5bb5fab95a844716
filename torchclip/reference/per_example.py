"""Clipping each example's gradient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchclip.reference import checks
from torchclip.reference.arrays import Array, check_arrays, norm_of
from torchclip.reference.norm import clip_coefficient

__all__ = ["clip_per_example"]


def clip_per_example(grads: Sequence[Array], max_norm: float) -> tuple[list[Array], int]:
    r"""Clip each example's gradient, then add the examples: the clipping step of DP-SGD.

    The gradient ``g_i`` of example ``i`` is slice ``i`` of all arrays together:

        g_i ← min(1, max_norm / (‖g_i‖ + 1e-6)) · g_i        sums = Σ_i g_i

    Twin of ``torchclip.clip_per_example``.

    Args:
        grads: one array per parameter, of shape ``(examples, *parameter.shape)``; not modified.
        max_norm: the threshold for each example's norm.

    Returns:
        The sums of the clipped gradients, of the parameters' shapes, and the number of examples clipped.

    References:
        Abadi et al., *Deep Learning with Differential Privacy*, 2016, algorithm 1,
        https://arxiv.org/abs/1607.00133

    Examples:
        >>> sums, clipped = clip_per_example([np.array([[3.0, 4.0], [0.03, 0.04]])], max_norm=0.5)
        >>> np.round(sums[0], 4), clipped
        (array([0.33, 0.44]), 1)
    """
    max_norm = checks.threshold("max_norm", max_norm)
    check_arrays(grads, writeable=False)
    counts = {g.shape[0] if g.ndim else None for g in grads}
    if None in counts or len(counts) > 1:
        raise ValueError(
            "every array in `grads` must have the same number of examples along its first axis, "
            f"got shapes {[g.shape for g in grads]}"
        )
    examples = range(next(iter(counts), None) or 0)
    coefficients = [clip_coefficient(max_norm, norm_of([g[i] for g in grads], 2.0)) for i in examples]
    sums = []
    for grad in grads:
        wide = np.result_type(grad.dtype, np.float64)
        total = np.zeros(grad.shape[1:], dtype=wide)
        # An infinite norm gives 0 times inf, which is NaN; a sum beyond the dtype's range is inf.
        with np.errstate(invalid="ignore", over="ignore"):
            for i in examples:
                total += coefficients[i] * grad[i].astype(wide)
            sums.append(total.astype(grad.dtype))
    return sums, sum(not c >= 1 for c in coefficients)
