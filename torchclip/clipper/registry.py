"""Which Clipper each optimizer has, and a hook that adjusts new Clippers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, ref

from torch.optim import Optimizer

_Adjustment: TypeAlias = Callable[[Any, Any, Any], tuple[Any, Any]]
"""Takes a new Clipper's optimizers, ``max_norm`` and ``nonfinite``; returns what replaces the last two."""

clippers: WeakKeyDictionary[Optimizer, ref[Any]] = WeakKeyDictionary()
"""The optimizers that have a Clipper; it does not keep Clippers alive."""

_adjustment: list[_Adjustment] = []


def clipper_of(optimizer: Optimizer) -> Any:
    """The Clipper of an optimizer; None if it has none."""
    found = clippers.get(optimizer)
    return None if found is None else found()


def set_adjustment(adjustment: _Adjustment) -> Callable[[], None]:
    """Adjust every new Clipper, as ``torchclip run`` does to try other thresholds.

    Returns:
        A function that ends this.
    """
    _adjustment[:] = [adjustment]
    return _adjustment.clear


def adjusted(optimizer: Any, max_norm: Any, nonfinite: Any) -> tuple[Any, Any]:
    """The ``max_norm`` and ``nonfinite`` of a new Clipper, whose arguments are not checked yet."""
    return _adjustment[0](optimizer, max_norm, nonfinite) if _adjustment else (max_norm, nonfinite)
