"""Other rules than a threshold for the norm, as objects that a ``Clipper`` takes as ``max_norm``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

__all__ = ["Rule"]


class Rule(ABC):
    """A rule of clipping in place of ``max_norm``.

    A clipper measures the norm of the gradients, lets the rule clip those of all parameter groups without a
    ``max_norm`` of their own, and measures again.  The ratio of the two norms is the step's coefficient.
    """

    usual: ClassVar[tuple[str, ...] | None] = None
    """The kernel's name for the rule, and the attributes with its numbers; None if there is none."""

    def __repr__(self) -> str:
        _, *names = self.usual or ("",)
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)}' for name in names)})"

    @abstractmethod
    def clip_(self, parameters: Sequence[Tensor], grad_scale: Tensor | None = None) -> None:
        """Clip the gradients of the parameters in place.

        Args:
            parameters: the parameters of one or several groups.
            grad_scale: the scale of a GradScaler, if the gradients are still multiplied by it; the rule
                applies to the unscaled gradients.

        Raises:
            TypeError: for gradients that cannot be clipped in this way; then none is changed.
        """
