"""The thresholds of all sets of gradients that are clipped together, with one interface."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from torchclip._core import arguments, scalars
from torchclip._core.batch import Norms
from torchclip.thresholds.base import MaxNorm, Threshold
from torchclip.thresholds.forms import FLOATS
from torchclip.thresholds.learned import Learned, Rows, has_own_update
from torchclip.thresholds.quantile_tracker import QuantileTracker

__all__ = ["ThresholdBank"]

# From this many sets in host memory on, one formula for all of them is faster than a call for each.
_MANY = 16
_ALL = "all"


class ThresholdBank:
    """One interface to what a user passes as ``max_norm``: a number, a callable or a threshold object.

    A threshold object learns from one sequence of norms, so every set of gradients that is clipped together
    gets its own copy.  A few sets in host memory have objects.  Many sets, or sets whose norms are on a
    device, share ``Rows``, if the threshold supports them.

    A clipper uses it so, for each step that is one of training's:

        bank.begin_step(step)
        max_norms = bank.max_norms(names, norms, norm_type)
        clip_coefs = scalars.clip_coefs(max_norms, norms, bank.eps)

    Within a step each set's threshold is asked for once.  User code may run then, and change gradients; to be
    asked again is to be answered the same, but for sets that had no gradient before.

    All sets are passed in one call, because some thresholds join their norms.  Norms that are tensors on one
    device are passed as one tensor, and nothing waits for it if the bank ``answers_tensors``; otherwise the
    values are read.

    Args:
        max_norm: the threshold.
        argument: its name in errors.
        in_rounds: whether several optimizers step together.

    Attributes:
        number: the threshold, if it is a number.
        learns: whether it is a threshold object, which must be asked in every step.
        eps: what is added to the norm in the clip coefficient: 1e-6 as in torch, but nothing for a threshold
            object, whose answer may be the norm itself.
        runs_user_code: whether asking it runs user code.
        per_parameter: whether it is a threshold for single parameters (AdaGC): the clipper then measures the
            norm of each of them, whatever its scope.
        answers_tensors: whether it returns a tensor of thresholds for a tensor of norms, without waiting.
        asked: how often the threshold itself was asked in this step.
    """

    def __init__(self, max_norm: MaxNorm, argument: str = "max_norm", in_rounds: bool = False) -> None:
        self._argument, self._in_rounds = argument, in_rounds
        if isinstance(max_norm, type):
            name = max_norm.__name__
            raise TypeError(f"`{argument}` is the class {name}; pass an object of it, such as {name}()")
        if isinstance(max_norm, QuantileTracker):
            raise TypeError(
                f"`{argument}` is a QuantileTracker, which learns from shares of examples, not from norms; "
                "use it with clip_per_example"
            )
        # Checked once: checking a protocol takes longer than the rest of a small step.
        self.learns = isinstance(max_norm, Threshold)
        is_object = self.learns or callable(max_norm)
        self._max_norm: Any = max_norm if is_object else arguments.threshold(argument, max_norm)
        self.number = self._max_norm if isinstance(self._max_norm, float) else None
        self.eps = 0.0 if self.learns else scalars.EPS
        self.runs_user_code = is_object and not type(max_norm).__module__.startswith("torchclip.")
        self.per_parameter = self.learns and bool(getattr(max_norm, "per_parameter", False))
        self.answers_tensors = _takes_rows(max_norm, torch.device("meta"))
        self._takes_rows_on_host = _takes_rows(max_norm, None)
        # What was learned: an object by the name of each set; or rows, with their numbers by that name.
        self._objects: dict[str, Any] = {}
        self._rows: Rows | None = None
        self._row_of: dict[str, int] = {}
        # The names of the last call, and the objects that learn from their norms, or their rows unless all
        # are in order.
        self._names: tuple[str, ...] | None = None
        self._updates: list[Callable[[float], float]] = []
        self._index: Any = None
        self._before_round: ThresholdBank | None = None
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Have each set's threshold asked for once from now on, for the step of this number."""
        self.asked, self._step, self._closed = 0, step, False
        self._common: float | None = None
        # The names and norms of the sets that were asked for, and their thresholds.
        self._known: tuple[Sequence[str], Norms, Norms] | None = None

    def close(self) -> None:
        """Refuse sets that had no gradient before, for the rest of the step."""
        self._closed = True

    def begin_round(self) -> None:
        """Record what was learned before a round of several optimizers, for a state saved during it."""
        if self.learns and self._in_rounds:
            self._before_round = None
            self._before_round = self._copied()

    def before_round(self) -> ThresholdBank:
        """A bank with what this one had learned when ``begin_round`` was last called."""
        return self if self._before_round is None else self._before_round

    def _copied(self) -> ThresholdBank:
        copied = copy.copy(self)
        copied._objects = {name: _copied_object(each) for name, each in self._objects.items()}
        copied._rows = None if self._rows is None else self._rows.copied()
        copied._row_of, copied._names = dict(self._row_of), None
        return copied

    def add(self, names: Iterable[str]) -> None:
        """Add sets with these names that do not exist yet; they start from ``max_norm``."""
        new = [name for name in names if name not in self._row_of and name not in self._objects]
        if not self.learns or not new:
            return
        self._names = None
        objects = {name: copy.deepcopy(self._max_norm) for name in new}
        if self._rows is None:
            self._objects.update(objects)
        else:
            self._rows.append([*objects.values()])
            self._row_of.update({name: row for row, name in enumerate(new, start=len(self._row_of))})

    @property
    def thresholds(self) -> Mapping[str, Threshold]:
        """The threshold objects with what they have learned, by set name.  Waits for an accelerator."""
        if self._rows is None:
            return MappingProxyType(self._objects)
        return MappingProxyType(dict(zip(self._row_of, self._rows.thresholds(), strict=True)))

    def max_norms(self, names: Sequence[str], norms: Norms, norm_type: float = 2.0) -> float | Norms:
        """This step's threshold for each of the sets with these names and norms.

        Args:
            names: the names of the sets. The same list object in every step is fastest. Of a number or a
                callable they do not matter.
            norms: their norms; ``ABSENT`` without a gradient, from which nothing is learned.
            norm_type: the order of the norms.

        Returns:
            One threshold for all if it is a number or a callable.  Else, of a tensor a tensor on its device
            if the bank ``answers_tensors``, and a list otherwise.

        Raises:
            RuntimeError: if a set appears that had no gradient when the bank was closed.
        """
        if not self.learns:
            if self._common is None:
                self._common = self.number if self.number is not None else self._called()
            return self._common
        if self._known is not None:
            return self._again(names, norms, norm_type)
        max_norms = self._learned(names, norms, norm_type)
        self._known = names, norms, max_norms
        return max_norms

    def _called(self) -> float:
        self.asked += 1
        return arguments.threshold(f"{self._argument}({self._step})", self._max_norm(self._step))

    def _again(self, names: Sequence[str], norms: Norms, norm_type: float) -> list[float]:
        """The thresholds that were learned, and those of sets of which there was no norm before."""
        assert self._known is not None
        before = zip(self._known[0], *map(scalars.numbers, self._known[1:]), strict=True)
        known = {name: max_norm for name, norm, max_norm in before if not norm < 0}
        present = {
            name: norm for name, norm in zip(names, scalars.numbers(norms), strict=True) if not norm < 0
        }
        unknown = [name for name in present if name not in known]
        if unknown and self._closed:
            raise RuntimeError(
                f"a gradient appeared in the middle of a step ({', '.join(unknown)}), after thresholds "
                "had been asked for twice; set gradients before optimizer.step(). The step was called off"
            )
        answers = self._learned(unknown, [present[name] for name in unknown], norm_type)
        known.update(zip(unknown, scalars.numbers(answers), strict=True))
        self._known = [*known], [0.0] * len(known), [*known.values()]
        return [known.get(name, math.inf) for name in names]

    def _learned(self, names: Sequence[str], norms: Norms, norm_type: float) -> Norms:
        if not names:
            return norms
        self.asked += 1
        if names is not self._names and tuple(names) != self._names:
            self.add(names)
            self._names = None
        if not isinstance(norms, list):
            if self.answers_tensors:
                return self._learned_in_rows(names, norms, norm_type, norms.device)
            norms = norms.tolist()
        if self._has_rows_on_host():
            return self._learned_in_rows(names, norms, norm_type, None)
        return self._learned_by_objects(names, norms)

    def max_norm_of_all(self, norm: float) -> float:
        """``max_norms`` for the single set ``"all"``, whose norm is a finite number in host memory.

        For the kernel's hook; only for a bank that learns, without user code.
        """
        self.begin_round()
        if self._rows is None and _ALL in self._objects:
            max_norm: float = self._objects[_ALL]._learn(norm, FLOATS)
            return max_norm
        (number,) = scalars.numbers(self._learned([_ALL], [norm], 2.0))
        return number

    def _has_rows_on_host(self) -> bool:
        many = self.per_parameter or len(self._row_of) + len(self._objects) >= _MANY
        return self._takes_rows_on_host and many

    def _learned_by_objects(self, names: Sequence[str], norms: Sequence[float]) -> list[float]:
        if self._rows is not None:
            self._objects, self._rows, self._row_of, self._names = dict(self.thresholds), None, {}, None
        if self._names is None:
            self._updates, self._names = [self._objects[name].update for name in names], tuple(names)
        # A norm of -inf is not finite, but not absent.
        answers = [
            math.inf if -math.inf < norm < 0 else update(norm)
            for update, norm in zip(self._updates, norms, strict=True)
        ]
        if self.runs_user_code:
            called = f"{type(self._max_norm).__name__}.update()"
            answers = [arguments.threshold(called, answer) for answer in answers]
        return answers

    def _learned_in_rows(
        self, names: Sequence[str], norms: Norms, norm_type: float, device: torch.device | None
    ) -> Norms:
        rows = self._rows_on(device)
        if self._names is None:
            self._names, self._index = tuple(names), self._places(names, device)
        return rows.update(norms, norm_type, self._index)

    def _places(self, names: Sequence[str], device: torch.device | None) -> Any:
        """The rows of the sets with these names, or None if they are all rows in order."""
        rows = np.array([self._row_of[name] for name in names])
        if np.array_equal(rows, np.arange(len(self._row_of))):
            return None
        return rows if device is None else torch.from_numpy(rows).to(device, non_blocking=True)

    def _rows_on(self, device: torch.device | None) -> Rows:
        """The rows for norms on a device, made from what was learned elsewhere if needed."""
        if self._rows is None or self._rows.device != device:
            thresholds: Mapping[str, Any] = self.thresholds
            self._rows = Rows([*thresholds.values()], device)
            self._row_of = {name: row for row, name in enumerate(thresholds)}
            self._objects, self._names = {}, None
        return self._rows

    def state_dict(self) -> dict[str, Any]:
        """What the threshold objects have learned, by the name of the set.  Waits for an accelerator."""
        return {name: threshold.state_dict() for name, threshold in self.thresholds.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict``; sets that are not in it start from the beginning.

        Raises:
            ValueError: if another kind of threshold has learned ``state``; then nothing has changed.
        """
        loaded = self.check(state)
        names = [*self._row_of, *self._objects]
        self._objects, self._rows, self._row_of, self._names = loaded, None, {}, None
        self.add(names)

    def check(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The thresholds of a ``state_dict``; raises for anything else."""
        if state and not self.learns:
            raise ValueError(
                f"`state` holds what a threshold object learned, but `{self._argument}` is "
                f"{self._max_norm!r}; pass the same kind of threshold object as in the saved run"
            )
        objects: dict[str, Any] = {name: copy.deepcopy(self._max_norm) for name in state}
        for name, threshold in objects.items():
            threshold.load_state_dict(state[name])
        return objects

    def __repr__(self) -> str:
        return repr(self._max_norm)


def _copied_object(threshold: Any) -> Any:
    return threshold.copied() if isinstance(threshold, Learned) else copy.deepcopy(threshold)


def _takes_rows(max_norm: Any, device: torch.device | None) -> bool:
    """Whether many sets can learn together whose norms are on a device (None for the host)."""
    return (
        isinstance(max_norm, Learned) and not has_own_update(type(max_norm)) and max_norm._takes_rows(device)
    )
