"""What every clipper must compute, in NumPy alone, written to be read beside the book.

The subject is section 6.1.4 of *Deep Learning from Scratch 2* (gradient clipping against the exploding
gradients of an RNN).  All gradients together are one vector ``ĝ``; when its norm passes a threshold it is
scaled back onto it:

    if ‖ĝ‖ ≥ threshold:   ĝ ← (threshold / ‖ĝ‖) ĝ

``clip_grads`` is the book's function, and the twin of ``torchclip.clip_grad_norm_``.  The other clippers are
the twins of the torch functions of the same name (without the trailing underscore), ``global_norm`` is that
of ``torchclip.get_total_norm``, and the thresholds are those of ``torchclip.Percentile`` and
``torchclip.ZScore``: each can be tested against its twin.  The tests, the book's chapter and the
documentation use this module, nothing that computes with torch does; it is slow and plain on purpose.

Gradients are NumPy arrays of floating or complex dtype; one that is listed twice counts once.  Functions that
clip modify them in place, and refuse bad input (integer arrays, arrays that cannot be written, a negative or
NaN threshold) before they change anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
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

Array = NDArray[Any]


def global_norm(grads: Sequence[Array], norm_type: float | str = 2.0) -> float:
    r"""The norm of all gradients, taken as one vector.

    Section 6.1.4 gives it for ``norm_type=2``:

        ‖ĝ‖ = sqrt( Σ_grads Σ_elements g² )

    and in general it is ``(Σ |g|^p)^(1/p)``; for ``p = inf`` the largest ``|g|``, for ``-inf`` the smallest,
    for ``0`` the number of elements that are not zero.

    The book adds up ``g²``.  Here each ``|g|`` is first divided by the largest one, and the result multiplied
    by it again, which is the same number but cannot overflow or underflow on the way.

    Twin of ``torchclip.get_total_norm``.

    Args:
        grads: floating or complex arrays of any shape; may be empty.
        norm_type: the order ``p`` of the norm, any number or ``"inf"``.

    Returns:
        The norm as a Python float; ``0.0`` for no elements; ``inf`` or ``nan`` where gradients are.

    Raises:
        TypeError: if a gradient is not a floating or complex array.
        ValueError: if ``norm_type`` is NaN or an unknown string.

    Examples:
        >>> global_norm([np.array([3.0, 0.0]), np.array([[4.0]])])
        5.0
    """
    p = _order(norm_type)
    grads = _check_arrays(grads, writeable=False)
    return _norm([_magnitudes(g) for g in grads], p)


def clip_grads(grads: Sequence[Array], max_norm: float, norm_type: float | str = 2.0) -> float:
    r"""Scale all gradients so that their joint norm is at most ``max_norm``: the book's ``clip_grads``.

    Section 6.1.4:

        rate = max_norm / (‖ĝ‖ + 1e-6)
        if rate < 1:
            for every gradient:  grad *= rate

    The 1e-6 keeps the division from being one by zero.  All gradients share one ``rate``, so the direction of
    the step stays the same and only its length changes.

    Twin of ``torchclip.clip_grad_norm_``.  One thing goes beyond the book, as in torch: if the norm is
    NaN, the rate is too, and it is multiplied in, so that a NaN in one gradient is seen in all of them.

    Args:
        grads: floating or complex arrays of any shape, modified in place.
        max_norm: the threshold, at least 0. ``inf`` only measures.
        norm_type: the order of the norm, any number or ``"inf"``.

    Returns:
        The norm before clipping. (The book's function returns nothing.)

    Raises:
        TypeError: if a gradient is not a floating or complex array, or ``max_norm`` is not a number.
        ValueError: if ``max_norm`` is negative or NaN, or a gradient is not writeable.

    Examples:
        >>> grads = [np.array([3.0, 0.0]), np.array([[4.0]])]
        >>> clip_grads(grads, max_norm=1.0)
        5.0
        >>> np.round(grads[1], 4)
        array([[0.8]])
    """
    p = _order(norm_type)
    max_norm = _threshold("max_norm", max_norm)
    grads = _check_arrays(grads, writeable=True)
    total_norm = _norm([_magnitudes(g) for g in grads], p)
    _scale(grads, clip_coefficient(max_norm, total_norm))
    return total_norm


def clip_coefficient(max_norm: float, total_norm: float) -> float:
    """What the gradients are multiplied by: ``min(1, max_norm / (total_norm + 1e-6))``.

    NaN if ``total_norm`` is NaN; always 1 for an infinite ``max_norm``, which only measures.

    Examples:
        >>> round(clip_coefficient(5.0, 21.71), 2)
        0.23
        >>> clip_coefficient(5.0, 2.0)
        1.0
    """
    max_norm = _threshold("max_norm", max_norm)
    total_norm = _number("total_norm", total_norm)
    if math.isinf(max_norm):
        return 1.0
    rate = max_norm / (total_norm + 1e-6)
    return 1.0 if rate >= 1 else rate


def clip_grads_with_norm(grads: Sequence[Array], max_norm: float, total_norm: float) -> None:
    """Scale the gradients as ``clip_grads`` does, with a norm that was computed before.

    Twin of ``torchclip.clip_grads_with_norm_``.

    Args:
        grads: floating or complex arrays, modified in place.
        max_norm: the threshold, at least 0.
        total_norm: the norm to compare with it.
    """
    max_norm = _threshold("max_norm", max_norm)
    total_norm = _number("total_norm", total_norm)
    if total_norm < 0:
        raise ValueError(f"`total_norm` must be at least 0, got {total_norm}")
    grads = _check_arrays(grads, writeable=True)
    _scale(grads, clip_coefficient(max_norm, total_norm))


def clip_grad_value(grads: Sequence[Array], clip_value: float) -> None:
    """Limit every single element to ``[-clip_value, clip_value]``.

    Twin of ``torchclip.clip_grad_value_``.  Unlike clipping by norm this turns the direction of the step.

    Args:
        grads: real floating arrays, modified in place. NaN stays NaN.
        clip_value: the largest magnitude allowed, at least 0.

    Examples:
        >>> grad = np.array([-3.0, 0.5])
        >>> clip_grad_value([grad], 1.0)
        >>> grad
        array([-1. ,  0.5])
    """
    clip_value = _threshold("clip_value", clip_value)
    _check_arrays(grads, writeable=True, real=True)
    for grad in grads:
        # A limit beyond the dtype's range limits nothing.
        limit = clip_value if clip_value <= float(np.finfo(grad.dtype).max) else math.inf
        np.clip(grad, -limit, limit, out=grad)


def clip_grad_norm_per_parameter(
    grads: Sequence[Array], max_norm: float, norm_type: float | str = 2.0
) -> list[float]:
    """Clip each gradient to ``max_norm`` on its own, as if the others were not there.

    Twin of ``torchclip.clip_grad_norm_per_parameter_``.

    Args:
        grads: floating or complex arrays, modified in place.
        max_norm: the threshold for each gradient's norm, at least 0.
        norm_type: the order of the norm.

    Returns:
        The norms before clipping, in the order of the distinct gradients.

    Examples:
        >>> clip_grad_norm_per_parameter([np.array([3.0, 4.0]), np.array([0.5])], max_norm=1.0)
        [5.0, 0.5]
    """
    p = _order(norm_type)
    max_norm = _threshold("max_norm", max_norm)
    grads = _check_arrays(grads, writeable=True)
    norms = [_norm([_magnitudes(g)], p) for g in grads]
    for grad, norm in zip(grads, norms, strict=True):
        _scale([grad], clip_coefficient(max_norm, norm))
    return norms


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

    The units of an array with two or more axes lie along its first axis; a vector or a scalar is one unit.
    Twin of ``torchclip.clip_grad_adaptive_``.

    Args:
        weights: the parameters' values, unchanged.
        grads: their gradients, of the same shapes, modified in place.
        clip_factor: the largest ratio of the two norms (λ in the paper), at least 0.
        eps: the least weight norm that counts, so that weights that start at zero can move.
        norm_type: the order of the norm.

    References:
        Brock, De, Smith and Simonyan, *High-Performance Large-Scale Image Recognition Without Normalization*,
        2021, section 4, https://arxiv.org/abs/2102.06171

    Examples:
        >>> grad = np.array([[3.0, 4.0], [0.3, 0.4]])
        >>> clip_grad_adaptive([np.array([[6.0, 8.0], [6.0, 8.0]])], [grad], clip_factor=0.1)
        >>> np.round(grad, 4)
        array([[0.6, 0.8], [0.3, 0.4]])
    """
    p = _order(norm_type)
    clip_factor = _threshold("clip_factor", clip_factor)
    eps = _threshold("eps", eps)
    _check_arrays(weights, writeable=False, name="weights")
    _check_arrays(grads, writeable=True)
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
            limit = clip_factor * max(_norm([_magnitudes(weight[unit])], p), eps)
            norm = _norm([_magnitudes(grad[unit])], p)
            if not norm <= limit:
                # A norm of 0 comes here with a limit of NaN only.
                _scale([grad[(*unit, ...)]], limit / norm if norm else limit)


def clip_per_example(grads: Sequence[Array], max_norm: float) -> tuple[list[Array], int]:
    r"""Clip each example's gradient, then add the examples up: the clipping step of DP-SGD.

    Example ``i`` owns slice ``i`` of every array.  Its norm is taken over all of them:

        g_i ← min(1, max_norm / (‖g_i‖ + 1e-6)) · g_i        sums = Σ_i g_i

    Twin of ``torchclip.clip_per_example``.

    Args:
        grads: one array a parameter, of shape ``(examples, *parameter.shape)``, unchanged.
        max_norm: the threshold for each example's norm, at least 0.

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
    max_norm = _threshold("max_norm", max_norm)
    _check_arrays(grads, writeable=False)
    counts = {g.shape[0] if g.ndim else None for g in grads}
    if None in counts or len(counts) > 1:
        raise ValueError(
            "every array in `grads` must have the same number of examples along its first axis, "
            f"got shapes {[g.shape for g in grads]}"
        )
    examples = range(next(iter(counts), None) or 0)
    coefficients = [
        clip_coefficient(max_norm, _norm([_magnitudes(g[i]) for g in grads], 2.0)) for i in examples
    ]
    sums = []
    for grad in grads:
        wide = np.result_type(grad.dtype, np.float64)
        total = np.zeros(grad.shape[1:], dtype=wide)
        # 0 (of an infinite norm) times inf is NaN, and a sum beyond the dtype's range is inf.
        with np.errstate(invalid="ignore", over="ignore"):
            for i in examples:
                total += coefficients[i] * grad[i].astype(wide)
            sums.append(total.astype(grad.dtype))
    return sums, sum(not c >= 1 for c in coefficients)


def percentile_thresholds(
    norms: Sequence[float],
    percentile: float = 10.0,
    window: int | None = None,
    warmup: int = 0,
    max_norm: float = math.inf,
) -> Array:
    r"""AutoClip's threshold for every step of a run: a percentile of the norms so far.

    With ``H_t`` the finite ones of the norms up to and including the step's own, or the last ``window`` of
    those:

        threshold_t = min(percentile of H_t, max_norm)

    Twin of ``torchclip.Percentile``.

    Args:
        norms: the gradient norm of each step.
        percentile: between 0 and 100.
        window: how many of the latest finite norms count; ``None`` for all.
        warmup: before so many finite norms were seen, the threshold is ``max_norm``.
        max_norm: the largest threshold.

    Returns:
        The thresholds, of shape ``(len(norms),)``, float64.

    References:
        Seetharaman, Wichern, Pardo and Le Roux, *AutoClip: Adaptive Gradient Clipping for Source Separation
        Networks*, 2020, https://arxiv.org/abs/2007.14469

    Examples:
        >>> percentile_thresholds([1.0, 3.0, 100.0, math.nan], percentile=50.0)
        array([1., 2., 3., 3.])
    """
    norms = _norms(norms)
    percentile = _at_most("percentile", percentile, 100)
    window = None if window is None else _count("window", window, 1)
    warmup = _count("warmup", warmup, 0)
    max_norm = _threshold("max_norm", max_norm)
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
    r"""ZClip's threshold for every step of a run: spikes above the z-score ``threshold`` are pulled back.

    Mean ``μ`` and variance ``σ²`` start as those of the first ``warmup`` finite norms.  Then, step by step:

        z = (g - μ) / σ
        if z > threshold:  g ← μ + (threshold² / z) σ    ("adaptive_scaling")
                           g ← μ                         ("mean")
                           g ← μ + threshold σ           ("percentile")
        μ  ← alpha μ  + (1 - alpha) g
        σ² ← alpha σ² + (1 - alpha) (g - μ)²

    The step's threshold is the new ``g`` for a spike and ``μ + threshold σ`` otherwise, ``max_norm`` in the
    warm-up, and never more than ``max_norm``.  Twin of ``torchclip.ZScore``.

    Args:
        norms: the gradient norm of each step.
        alpha: how much of the mean and variance is kept each step.
        threshold: the z-score above which a norm is a spike.
        warmup: how many finite norms the mean and variance start from.
        clip_option: what a spike is pulled back to.
        skip_update_on_spike: a spike leaves mean and variance as they are.
        max_norm: the largest threshold.

    Returns:
        The thresholds, of shape ``(len(norms),)``, float64.

    References:
        Kumar, Owen, Chowdhury and Güra, *ZClip: Adaptive Spike Mitigation for LLM Pre-Training*, 2025,
        https://arxiv.org/abs/2504.02507

    Examples:
        >>> zscore_thresholds([1.0, 3.0, 10.0], threshold=2.0, warmup=2)
        array([inf, inf, 2.5])
    """
    norms = _norms(norms)
    alpha = _at_most("alpha", alpha, 1)
    threshold = _threshold("threshold", threshold)
    warmup = _count("warmup", warmup, 1)
    if not isinstance(clip_option, str) or clip_option not in ("adaptive_scaling", "mean", "percentile"):
        raise ValueError(
            f"`clip_option` must be 'adaptive_scaling', 'mean' or 'percentile', got {clip_option!r}"
        )
    max_norm = _threshold("max_norm", max_norm)
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
            # threshold²/z · σ, with z's σ multiplied up: no spike divides by zero.
            limit = mean + threshold**2 * var / (norm - mean)
        elif spike and clip_option == "mean":
            limit = mean
        thresholds[t] = min(limit, max_norm)
        if math.isfinite(norm) and not (spike and skip_update_on_spike):
            g = limit if spike else norm
            mean = alpha * mean + (1 - alpha) * g
            var = alpha * var + (1 - alpha) * (g - mean) ** 2
    return thresholds


def _norm(magnitudes: Sequence[Array], p: float) -> float:
    """``(Σ m^p)^(1/p)`` over float64 arrays of magnitudes, without overflow on the way."""
    m = np.concatenate([a.ravel() for a in magnitudes]) if magnitudes else np.zeros(0)
    if m.size == 0:
        return 0.0
    if p == 0:
        return float(np.count_nonzero(m))
    leading = float(m.max() if p > 0 else m.min())
    if math.isinf(p) or leading == 0 or not math.isfinite(leading):
        return leading
    with np.errstate(over="ignore"):
        return float(leading * np.sum((m / leading) ** p) ** (1 / p))


def _magnitudes(grad: Array) -> Array:
    """``|g|`` in float64."""
    return np.abs(grad.astype(np.complex128 if np.iscomplexobj(grad) else np.float64))


def _scale(grads: Sequence[Array], rate: float) -> None:
    """Multiply in place by ``rate`` where it is below 1 (or NaN), the product rounded once."""
    if rate >= 1:
        return
    for grad in grads:
        # A complex number times a real one: each part on its own.
        parts = [grad.real, grad.imag] if np.iscomplexobj(grad) else [grad]
        for part in parts:
            with np.errstate(invalid="ignore", under="ignore"):
                part[...] = part.astype(np.float64) * rate


def _order(norm_type: float | str) -> float:
    if isinstance(norm_type, str) and norm_type not in ("inf", "-inf"):
        raise ValueError(f"`norm_type` must be a number or 'inf', got {norm_type!r}")
    p = float(norm_type) if isinstance(norm_type, str) else _number("norm_type", norm_type)
    if math.isnan(p):
        raise ValueError("`norm_type` is nan; pass a number such as 2.0, or 'inf'")
    return p


def _threshold(name: str, value: float) -> float:
    if not _number(name, value) >= 0:
        raise ValueError(f"`{name}` must be at least 0, got {value}")
    return float(value)


def _number(name: str, value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        kind = type(value).__name__
        raise ValueError(f"`{name}` must be within the range of float64, got a larger {kind}") from None


def _at_most(name: str, value: float, most: float) -> float:
    if not 0 <= _number(name, value) <= most:
        raise ValueError(f"`{name}` must be between 0 and {most}, got {value}")
    return float(value)


def _count(name: str, value: int, least: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}")
    return int(value)


def _norms(norms: Sequence[float]) -> list[float]:
    if not isinstance(norms, (list, tuple, np.ndarray)):
        raise TypeError(f"`norms` must be a list, a tuple or an array of numbers, got {norms!r}")
    return [_number("norms", norm) for norm in norms]


def _check_arrays(
    arrays: Sequence[Array], *, writeable: bool, real: bool = False, name: str = "grads"
) -> list[Array]:
    """The distinct ones of the arrays, in order, or an error that says what is wrong with them."""
    if not isinstance(arrays, (list, tuple)):
        raise TypeError(f"`{name}` must be a list or a tuple of arrays, got {type(arrays).__name__}")
    for i, a in enumerate(arrays):
        if not isinstance(a, np.ndarray):
            raise TypeError(f"`{name}` must hold NumPy arrays, item {i} is {type(a).__name__}")
        if not np.issubdtype(a.dtype, np.floating if real else np.inexact):
            kind = "real floating" if real else "floating or complex"
            raise TypeError(f"`{name}` must be of a {kind} dtype, item {i} is {a.dtype}; convert it first")
        if writeable and not a.flags.writeable:
            raise ValueError(
                f"`{name}` must be writeable, as clipping works in place, but item {i} is not; pass a copy"
            )
    return list({id(a): a for a in arrays}.values())
