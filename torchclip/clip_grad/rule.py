"""Ways of clipping that are no threshold for a norm, as objects that a ``Clipper`` takes as ``max_norm``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

__all__ = ["Rule"]


class Rule(ABC):
    """How gradients are clipped, where it is not by ``max_norm``.

    A clipper takes the norm of the gradients, has the rule clip those of all parameter groups that bring no
    ``max_norm`` along, and takes the norm again.  The ratio of the two is the step's coefficient.
    """

    usual: ClassVar[tuple[str, ...] | None] = None
    """What the kernel calls the rule, and the attributes with its numbers; None if it does not know it."""

    @abstractmethod
    def clip_(self, parameters: Sequence[Tensor], grad_scale: Tensor | None = None) -> None:
        """Clip the gradients of the parameters in place.

        Args:
            parameters: the parameters of one or several groups.
            grad_scale: what a GradScaler has multiplied the gradients by, if it has not taken it out yet; the
                rule is for the gradients without it.

        Raises:
            TypeError: for gradients that cannot be clipped so; none is changed then.
        """
