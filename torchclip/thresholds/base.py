"""The protocol of a threshold, and what a user passes as ``max_norm``, asked in one way.

A threshold is any object with the three methods of ``Threshold``.  Once a step it is told the norm of
the gradients and answers with the ``max_norm`` to clip to.  This needs the norm as a Python float, so on an
accelerator every step waits for it.  The thresholds of this package have a tensor form beside it (``each``),
which does not wait, and takes many norms at once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from torchclip._core import arguments, native, scalars
from torchclip._core.batch import Norms
from torchclip.thresholds.each import Each, integers
from torchclip.thresholds.quantile_tracker import QuantileTracker

__all__ = ["MaxNorm", "MaxNormRule", "Threshold"]

# From so many norms on in host memory, one operation on all of them is faster than a call for each.
_MANY = 16


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
    gets its own copy, made when it is first seen.  The copies are objects as long as there are few of them in
    host memory; else they are rows of the object's tensor form, if it has one.

    A clipper uses it so, once for each step that is one of training's:

        eps = 0.0 if rule.learns else scalars.EPS
        max_norms = rule.max_norms(step, names, norms, norm_type)
        clip_coefs = scalars.clip_coefs(max_norms, norms, eps)

    All sets that the rule covers come in one call, as rules need it that join their norms: names and norms of
    several parts one after the other (``[*a, *b]``, or ``torch.cat``).  Norms that are tensors on one device
    are handed over as one tensor, and nothing waits for it if the rule ``answers_tensors``; otherwise the
    values are read.

    Attributes:
        number: the threshold, if it is a number.
        learns: whether it is a threshold object. Then ``max_norms`` must be called for every step, and the
            coefficient has no 1e-6 in it.
        runs_user_code: whether asking it runs code that is not torchclip's.
        per_parameter: whether the rule is one for single parameters (AdaGC): the clipper then takes
            a norm for each of them, whatever else its scope would be.
        answers_tensors: whether a tensor of norms gets a tensor of thresholds, without waiting.
    """

    def __init__(self, max_norm: MaxNorm, argument: str = "max_norm") -> None:
        self._argument = argument
        if isinstance(max_norm, type):
            name = max_norm.__name__
            raise TypeError(f"`{argument}` is the class {name}; pass an object of it, such as {name}()")
        if isinstance(max_norm, QuantileTracker):
            raise TypeError(
                f"`{argument}` is a QuantileTracker, which learns from shares of examples, not from norms; "
                "use it with clip_per_example"
            )
        # Asked once: to ask a protocol takes longer than all the rest of a small step.
        self.learns = isinstance(max_norm, Threshold)
        is_object = self.learns or callable(max_norm)
        self._max_norm: Any = max_norm if is_object else arguments.threshold(argument, max_norm)
        self.number = self._max_norm if isinstance(self._max_norm, float) else None
        self.runs_user_code = is_object and not type(max_norm).__module__.startswith("torchclip.")
        self.per_parameter = self.learns and bool(getattr(max_norm, "per_parameter", False))
        # Of a device on which nothing is computed; host memory may be another matter.
        self.answers_tensors = self._make_each([], torch.device("meta")) is not None
        self._with_kernel: bool | None = None
        self._tensors_on_host = False
        self._copies: dict[str, Threshold] = {}
        # The tensor form, and which row of it is whose; then there are no copies.
        self._each: Each | None = None
        self._rows: dict[str, int] = {}
        # The names of the last call; what learns from their norms, or their rows unless all are in order.
        self._names: tuple[str, ...] | None = None
        self._updates: list[Callable[[float], float]] = []
        self._index: Tensor | None = None

    def _make_each(self, states: Sequence[Mapping[str, Any]], device: torch.device) -> Each | None:
        """The tensor form of several copies, or None if there is none."""
        if not self.learns or not _has_tensor_form(type(self._max_norm)):
            return None
        made: Each | None = self._max_norm.each(states, device)
        return made

    @property
    def thresholds(self) -> Mapping[str, Threshold]:
        """The copies, by the name of the set.  Waits for an accelerator."""
        return MappingProxyType(self._as_copies())

    def max_norms(self, step: int, names: Sequence[str], norms: Norms, norm_type: float = 2.0) -> Norms:
        """This step's threshold for each of the sets with these names and norms.

        Args:
            step: the number of the step, for a callable.
            names: what the sets are called. The same list object in every step is fastest.
            norms: their norms; ``ABSENT`` where there is no gradient, of which nothing is learned.
            norm_type: the order of the norms.

        Returns:
            The thresholds: from the tensor form a tensor on the device of the norms, else a list.  What a
            set without a gradient gets has no meaning; its coefficient is 1.
        """
        if not self.learns:
            max_norm = self._max_norm
            if not isinstance(max_norm, float):
                max_norm = arguments.threshold(f"{self._argument}({step})", max_norm(step))
            return [max_norm] * len(norms)
        if self._suits_tensors(norms):
            return self._learned_together(names, norms, norm_type)
        if self._each is not None:
            self._copies, self._each, self._names = self._as_copies(), None, None
        numbers = norms.tolist() if isinstance(norms, Tensor) else [float(norm) for norm in norms]
        return self._learned_singly(names, numbers)

    def _suits_tensors(self, norms: Norms) -> bool:
        if isinstance(norms, Tensor) and norms.device.type != "cpu":
            return self.answers_tensors
        if self._with_kernel is not native.active():  # which can be turned off at any time
            self._with_kernel = native.active()
            self._tensors_on_host = self._make_each([], torch.device("cpu")) is not None
        # As many as have learned, so that a run that was resumed goes on with the same digits.
        many = len(norms) >= _MANY or len(self._copies) >= _MANY
        several = self._each is not None or self.per_parameter or many
        return self._tensors_on_host and several

    def _learned_singly(self, names: Sequence[str], norms: Sequence[float]) -> list[float]:
        if names is not self._names and tuple(names) != self._names:
            self._updates, self._names = [self._update_of(name) for name in names], tuple(names)
        # A norm of -inf is not finite rather than absent.
        answers = [
            math.inf if -math.inf < norm < 0 else update(norm)
            for update, norm in zip(self._updates, norms, strict=True)
        ]
        if self.runs_user_code:
            called = f"{type(self._max_norm).__name__}.update()"
            answers = [arguments.threshold(called, answer) for answer in answers]
        return answers

    def _update_of(self, name: str) -> Callable[[float], float]:
        """Where the copy for a set learns; the copy is made if it is the first time."""
        if name not in self._copies:
            self._copies[name] = copy.deepcopy(self._max_norm)
        return self._copies[name].update

    def _learned_together(self, names: Sequence[str], norms: Norms, norm_type: float) -> Tensor:
        vector = norms if isinstance(norms, Tensor) else scalars.vector(norms)
        each = self._each_on(vector.device)
        if names is not self._names and tuple(names) != self._names:
            self._place(names, vector.device)
        if self._index is None:
            return each.update(vector, norm_type)
        everywhere = vector.new_full((len(self._rows),), scalars.ABSENT).index_copy_(0, self._index, vector)
        return each.update(everywhere, norm_type)[self._index]

    def _each_on(self, device: torch.device) -> Each:
        """The tensor form on a device, made of the copies or of the one on another device if need be."""
        if self._each is None or self._each.device != device:
            states = self.state_dict()
            self._each = self._make_each(list(states.values()), device)
            self._rows = {name: row for row, name in enumerate(states)}
            self._copies, self._names, self._index = {}, None, None
        assert self._each is not None
        return self._each

    def _place(self, names: Sequence[str], device: torch.device) -> None:
        """Find the rows of sets with these names, and add rows for new ones."""
        new = [name for name in names if name not in self._rows]
        if new:
            more = self._make_each([self._max_norm.state_dict()] * len(new), device)
            assert self._each is not None
            assert more is not None
            self._each.append(more)
            self._rows.update({name: row for row, name in enumerate(new, start=len(self._rows))})
        rows = [self._rows[name] for name in names]
        in_order = rows == list(range(len(self._rows)))
        self._index = None if in_order else integers(rows, device)
        self._names = tuple(names)

    def _as_copies(self) -> dict[str, Any]:
        return self._copies if self._each is None else self._copies_of(self.state_dict())

    def _copies_of(self, states: Mapping[str, Any]) -> dict[str, Any]:
        copies: dict[str, Any] = {name: copy.deepcopy(self._max_norm) for name in states}
        for name, threshold in copies.items():
            threshold.load_state_dict(states[name])
        return copies

    def state_dict(self) -> dict[str, Any]:
        """What the threshold objects have learned, by the name of the set.  Waits for an accelerator."""
        if self._each is not None:
            return dict(zip(self._rows, self._each.states(), strict=True))
        return {name: threshold.state_dict() for name, threshold in self._copies.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``.

        Raises:
            ValueError: if ``state`` holds what another kind of threshold learned.
        """
        if state and not self.learns:
            raise ValueError(
                f"`state` holds what a threshold object learned, but `{self._argument}` is "
                f"{self._max_norm!r}; pass the same kind of threshold object as in the saved run"
            )
        # Objects, which check their states; a tensor form is made of them in the next step that wants one.
        self._copies = self._copies_of(state)
        self._each, self._rows, self._names = None, {}, None

    def __repr__(self) -> str:
        return repr(self._max_norm)


def _has_tensor_form(kind: type) -> bool:
    """Whether a class answers for many norms as it does for one: not if it has an ``update`` of its own."""
    for cls in kind.__mro__:
        if "each" in vars(cls) or "update" in vars(cls):
            return "each" in vars(cls)
    return False
