"""Which Clipper each optimizer has, and a say in the Clippers that a program makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, ref

from torch.optim import Optimizer

__all__ = ["adjusted", "clipper_of", "clippers", "set_adjustment"]

Adjustment: TypeAlias = Callable[[Any, Any, Any], tuple[Any, Any]]
"""Takes what a new Clipper gets as optimizers, ``max_norm`` and ``nonfinite``; returns the last two anew."""

clippers: WeakKeyDictionary[Optimizer, ref[Any]] = WeakKeyDictionary()
"""The optimizers that have a Clipper, which is not kept alive."""

_adjustment: list[Adjustment] = []


def clipper_of(optimizer: Optimizer) -> Any:
    """The Clipper of an optimizer; None if it has none."""
    found = clippers.get(optimizer)
    return None if found is None else found()


def set_adjustment(adjustment: Adjustment) -> Callable[[], None]:
    """Have every new Clipper adjusted, as ``torchclip run`` does to try other thresholds.

    Returns:
        What ends this.
    """
    _adjustment[:] = [adjustment]
    return _adjustment.clear


def adjusted(optimizer: Any, max_norm: Any, nonfinite: Any) -> tuple[Any, Any]:
    """What a new Clipper takes as ``max_norm`` and ``nonfinite``; its arguments are not checked yet."""
    return _adjustment[0](optimizer, max_norm, nonfinite) if _adjustment else (max_norm, nonfinite)
