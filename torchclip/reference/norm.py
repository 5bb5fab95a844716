"""The norm of all gradients, and the book's clipping by that norm."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torchclip.reference import checks
from torchclip.reference.arrays import Array, check_arrays, norm_of, scale

__all__ = ["clip_coefficient", "clip_grads", "clip_grads_with_norm", "global_norm"]


def global_norm(grads: Sequence[Array], norm_type: float | str = 2.0) -> float:
    r"""The norm of all gradients, taken as one vector.

    Section 6.1.4 gives it for ``norm_type=2``:

        ‖ĝ‖ = sqrt( Σ_grads Σ_elements g² )

    In general it is ``(Σ |g|^p)^(1/p)``.  For ``p = inf`` it is the largest ``|g|``, for ``-inf`` the
    smallest, and for ``0`` the number of elements that are not zero.

    The book adds up ``g²``.  Here each ``|g|`` is first divided by the largest one, and the result is
    multiplied by the largest one again.  This gives the same number, but cannot overflow or underflow in
    between.

    Twin of ``torchclip.get_total_norm``.  It takes floating or complex arrays of any shape, and returns a
    float: ``0.0`` without elements, ``inf`` or ``nan`` if a gradient has one.

    Examples:
        >>> import numpy as np
        >>> global_norm([np.array([3.0, 0.0]), np.array([[4.0]])])
        5.0
    """
    p = checks.norm_type_of(norm_type)
    grads = check_arrays(grads, writeable=False)
    return norm_of(grads, p)


def clip_grads(grads: Sequence[Array], max_norm: float, norm_type: float | str = 2.0) -> float:
    r"""Scale all gradients so that their joint norm is at most ``max_norm``: the book's ``clip_grads``.

    Section 6.1.4:

        rate = max_norm / (‖ĝ‖ + 1e-6)
        if rate < 1:
            for every gradient:  grad *= rate

    The 1e-6 avoids a division by zero.  All gradients share one ``rate``, so the direction of the step stays
    the same and only its length changes.

    Twin of ``torchclip.clip_grad_norm_``.  It modifies floating or complex arrays of any shape in place, and
    returns the norm before clipping, where the book's function returns nothing.  One more thing goes beyond
    the book, as in torch: if the norm is NaN, the rate is NaN, so a NaN in one gradient spreads to all.

    Examples:
        >>> import numpy as np
        >>> grads = [np.array([3.0, 0.0]), np.array([[4.0]])]
        >>> clip_grads(grads, max_norm=1.0)
        5.0
        >>> np.round(grads[1], 4)
        array([[0.8]])
    """
    p = checks.norm_type_of(norm_type)
    max_norm = checks.threshold("max_norm", max_norm)
    grads = check_arrays(grads, writeable=True)
    total_norm = norm_of(grads, p)
    scale(grads, clip_coefficient(max_norm, total_norm))
    return total_norm


def clip_coefficient(max_norm: float, total_norm: float) -> float:
    """The number by which gradients are multiplied: ``min(1, max_norm / (total_norm + 1e-6))``.

    It is always 1 for an infinite ``max_norm``, which only measures, and otherwise NaN if ``total_norm`` is.

    Examples:
        >>> round(clip_coefficient(5.0, 21.71), 2)
        0.23
        >>> clip_coefficient(5.0, 2.0)
        1.0
    """
    max_norm = checks.threshold("max_norm", max_norm)
    total_norm = checks.number("total_norm", total_norm)
    if math.isinf(max_norm):
        return 1.0
    rate = max_norm / (total_norm + 1e-6)
    return 1.0 if rate >= 1 else rate


def clip_grads_with_norm(grads: Sequence[Array], max_norm: float, total_norm: float) -> None:
    """Scale all gradients in place as ``clip_grads`` does, with a norm that you computed earlier.

    Twin of ``torchclip.clip_grads_with_norm_``.
    """
    max_norm = checks.threshold("max_norm", max_norm)
    total_norm = checks.number("total_norm", total_norm)
    if total_norm < 0:
        raise ValueError(f"`total_norm` must be at least 0, got {total_norm}")
    grads = check_arrays(grads, writeable=True)
    scale(grads, clip_coefficient(max_norm, total_norm))
