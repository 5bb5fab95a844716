"""What a user may pass as ``max_norm``: the protocols of a threshold and of a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor


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
            norm: the norm before clipping.  It may be ``inf`` or ``nan``; do not learn from these.

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


@runtime_checkable
class Rule(Protocol):
    """A clipping rule in place of a threshold for the norm, such as ``torchclip.Value``.

    A ``Clipper`` measures the norm of the gradients.  Then the rule clips the gradients of all parameter
    groups without a ``max_norm`` of their own, and the Clipper measures again.  The ratio of the two norms is
    the coefficient of the step.
    """

    def clip_(self, parameters: Sequence[Tensor], grad_scale: Tensor | None = None) -> None:
        """Clip the gradients of some parameters in place.

        Args:
            parameters: the parameters of the groups without a ``max_norm`` of their own.
            grad_scale: a GradScaler's scale, if the gradients are still multiplied by it.  The rule applies
                to the unscaled gradients.

        Raises:
            TypeError: if the rule cannot clip one of the gradients.  No gradient is changed.
        """
        ...


MaxNorm: TypeAlias = float | Threshold | Callable[[int], float]
