"""Which Clipper each optimizer has, and a hook that adjusts new Clippers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch.optim import Optimizer

clippers: WeakKeyDictionary[Optimizer, ref[Any]] = WeakKeyDictionary()
"""The optimizers that have a Clipper; it does not keep Clippers alive."""

_adjustment: list[Callable[[Any, Any], Any]] = []


def clipper_of(optimizer: Optimizer) -> Any:
    """The Clipper of an optimizer; None if it has none, or cannot have one, as it cannot be hashed."""
    found = None if type(optimizer).__hash__ is None else clippers.get(optimizer)
    return None if found is None else found()


def set_adjustment(adjustment: Callable[[Any, Any], Any]) -> Callable[[], None]:
    """Adjust every new Clipper's ``max_norm``, as ``torchclip run`` does to try other thresholds.

    Args:
        adjustment: takes a Clipper's optimizer, or a list of them, and its ``max_norm``, before these are
            checked; returns the ``max_norm`` to use.

    Returns:
        A function that ends this.
    """
    _adjustment[:] = [adjustment]
    return _adjustment.clear


def adjusted(optimizer: Any, max_norm: Any) -> Any:
    """The ``max_norm`` of a new Clipper, whose arguments are not checked yet."""
    return _adjustment[0](optimizer, max_norm) if _adjustment else max_norm
