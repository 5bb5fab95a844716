"""The protocol of a threshold, and what a user passes as ``max_norm``, asked in one way.

A threshold is any object with the three methods of ``Threshold``.  Once a step it is told the norm of
the gradients and answers with the ``max_norm`` to clip to.  This needs the norm as a Python float, so on an
accelerator every step waits for it; with a plain number as ``max_norm`` none does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from torchclip._core import arguments

__all__ = ["MaxNorm", "MaxNormRule", "Threshold"]


@runtime_checkable
class Threshold(Protocol):
    """What a ``torchclip.Clipper`` asks of a threshold object; there is nothing to inherit from.

    In a distributed run every rank passes the same norms, so a threshold that decides by them alone gives the
    same answer everywhere.

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
        """Take in this step's norm and return this step's ``max_norm``.

        Args:
            norm: the norm before clipping; may be ``inf`` or ``nan``, which must leave no trace.

        Returns:
            The threshold for this step, at least 0; ``inf`` for a step that is not to be clipped.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything learned so far, as plain data (what ``json`` and ``torch.save`` take)."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where ``state_dict`` was taken."""
        ...


MaxNorm: TypeAlias = float | Threshold | Callable[[int], float]


class MaxNormRule:
    """What a user passes as ``max_norm``, a number, a callable or a threshold object, asked in one way.

    A threshold object learns from one sequence of norms, so every set of gradients that is clipped on its own
    gets its own copy, made when it is first seen.

    Attributes:
        learns: whether it is a threshold object.
    """

    def __init__(self, max_norm: MaxNorm) -> None:
        if isinstance(max_norm, type):
            name = max_norm.__name__
            raise TypeError(f"`max_norm` is the class {name}; pass an object of it, such as {name}()")
        # Asked once: to ask a protocol takes longer than all the rest of a small step.
        self.learns = isinstance(max_norm, Threshold)
        is_object = self.learns or callable(max_norm)
        self._max_norm: Any = max_norm if is_object else arguments.threshold("max_norm", max_norm)
        self._copies: dict[str, Threshold] = {}

    @property
    def thresholds(self) -> Mapping[str, Threshold]:
        """The copies, by the name of the set."""
        return MappingProxyType(self._copies)

    def max_norms(self, step: int, names: Iterable[str], norms: Sequence[float | Tensor]) -> list[float]:
        """This step's threshold for each of the sets with these names and norms."""
        if self.learns:
            return [self._learned(name, float(norm)) for name, norm in zip(names, norms, strict=True)]
        max_norm = self._max_norm
        if not isinstance(max_norm, float):
            max_norm = arguments.threshold(f"max_norm({step})", max_norm(step))
        return [max_norm] * len(norms)

    def _learned(self, name: str, norm: float) -> float:
        if name not in self._copies:
            self._copies[name] = copy.deepcopy(self._max_norm)
        return arguments.threshold(
            f"{type(self._max_norm).__name__}.update()", self._copies[name].update(norm)
        )

    def state_dict(self) -> dict[str, Any]:
        """What the threshold objects have learned, by the name of the set."""
        return {name: threshold.state_dict() for name, threshold in self._copies.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``.

        Raises:
            ValueError: if ``state`` holds what another kind of threshold learned.
        """
        if state and not self.learns:
            raise ValueError(
                f"`state` holds what a threshold object learned, but `max_norm` is {self._max_norm!r}; pass "
                "the same kind of threshold object as in the saved run"
            )
        copies: dict[str, Any] = {name: copy.deepcopy(self._max_norm) for name in state}
        for name, threshold in copies.items():
            threshold.load_state_dict(state[name])
        self._copies = copies

    def __repr__(self) -> str:
        return repr(self._max_norm)
