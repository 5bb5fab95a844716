"""Arrays of gradients: checks, norms and scaling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "check_arrays", "norm_of", "scale"]

# Numbers below the first are multiplied by the second, a power of two.
_SMALL, _LARGE = 1e-200, 2.0**600


Array: TypeAlias = NDArray[Any]


def norm_of(arrays: Sequence[Array], p: float) -> float:
    """``(Σ |a|^p)^(1/p)`` over the elements of arrays, in float64, without overflow in between."""
    m = np.concatenate([_magnitudes(a).ravel() for a in arrays]) if arrays else np.zeros(0)
    if p != 0 and 0 < m.max(initial=0.0) < _SMALL:
        # Otherwise magnitudes of complex numbers would be rounded to few digits.
        return norm_of([a * _LARGE for a in map(wide, arrays)], p) / _LARGE
    if m.size == 0:
        return 0.0
    if p == 0:
        return float(np.count_nonzero(m))
    leading = float(m.max() if p > 0 else m.min())
    if math.isinf(p) or leading == 0 or not math.isfinite(leading):
        return leading
    with np.errstate(over="ignore"):
        return float(leading * np.sum((m / leading) ** p) ** (1 / p))


def wide(grad: Array) -> Array:
    """The numbers in float64."""
    return grad.astype(np.complex128 if np.iscomplexobj(grad) else np.float64)


def _magnitudes(grad: Array) -> Array:
    """``|g|`` in float64."""
    return np.abs(wide(grad))


def scale(grads: Sequence[Array], rate: float) -> None:
    """Multiply in place by ``rate`` if it is below 1 or NaN; the product is rounded once."""
    if rate >= 1:
        return
    for grad in grads:
        # A complex number is multiplied part by part.
        parts = [grad.real, grad.imag] if np.iscomplexobj(grad) else [grad]
        for part in parts:
            with np.errstate(invalid="ignore", under="ignore"):
                part[...] = part.astype(np.float64) * rate


def check_arrays(
    arrays: Sequence[Array], *, writeable: bool, real: bool = False, name: str = "grads"
) -> list[Array]:
    """The distinct arrays, in order, or an error that says what is wrong with them."""
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
