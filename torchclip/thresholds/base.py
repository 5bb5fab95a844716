"""What a user may pass as ``max_norm``: the protocols of a threshold and of another rule."""

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


@runtime_checkable
class Rule(Protocol):
    """A rule of clipping in place of a threshold for the norm; ``torchclip.Value`` is one.

    A ``Clipper`` measures the norm of the gradients, lets the rule clip those of all parameter groups without
    a ``max_norm`` of their own, and measures again.  The ratio of the two norms is the step's coefficient.
    """

    def clip_(self, parameters: Sequence[Tensor], grad_scale: Tensor | None = None) -> None:
        """Clip the gradients of some parameters in place.

        Args:
            parameters: the parameters of the groups without a ``max_norm`` of their own.
            grad_scale: a GradScaler's scale, if the gradients are still multiplied by it; the rule applies to
                the unscaled gradients.

        Raises:
            TypeError: for gradients that cannot be clipped in this way; then none is changed.
        """
        ...


MaxNorm: TypeAlias = float | Threshold | Callable[[int], float]
