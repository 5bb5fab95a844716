"""The protocol of a threshold, and what a user may pass as ``max_norm``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

__all__ = ["MaxNorm", "Threshold"]


@runtime_checkable
class Threshold(Protocol):
    """The methods that a ``torchclip.Clipper`` needs of a threshold object; you need not inherit from it.

    In a distributed run every rank passes the same norms, so a threshold that depends on them alone gives the
    same result on all ranks.

    Examples:
        >>> import math
        >>> class TwiceTheMean:
        ...     def __init__(self):
        ...         self.total, self.steps = 0.0, 0
        ...
        ...     def update(self, norm):
        ...         if math.isfinite(norm):
        ...             self.total, self.steps = self.total + norm, self.steps + 1
        ...         return 2 * self.total / self.steps if self.steps else math.inf
        ...
        ...     def state_dict(self):
        ...         return dict(vars(self))
        ...
        ...     def load_state_dict(self, state):
        ...         vars(self).update(state)
        >>> threshold = TwiceTheMean()
        >>> [threshold.update(norm) for norm in [1.0, 3.0, 14.0]]
        [2.0, 4.0, 12.0]
        >>> isinstance(threshold, Threshold)
        True
    """

    def update(self, norm: float) -> float:
        """Learn from this step's norm and return this step's ``max_norm``.

        Args:
            norm: the norm before clipping; may be ``inf`` or ``nan``, from which it must not learn.

        Returns:
            The threshold for this step, at least 0; ``inf`` if the step must not be clipped.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything learned so far, as plain data that ``json`` and ``torch.save`` can store."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict``."""
        ...


MaxNorm: TypeAlias = float | Threshold | Callable[[int], float]
