"""The thresholds of all sets of gradients that are clipped together, with one interface."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from torchclip._core import arguments, scalars
from torchclip._core.batch import Norms
from torchclip.thresholds.base import MaxNorm, Threshold
from torchclip.thresholds.forms import FLOATS
from torchclip.thresholds.learned import Learned, Objects, Rows, has_own_update
from torchclip.thresholds.quantile_tracker import QuantileTracker

# From this many sets in host memory on, one formula for all of them is faster than a call for each.
_MANY = 16
_ALL = "all"


class ThresholdBank:
    """One interface to what a user passes as ``max_norm``: a number, a callable or a threshold object.

    A threshold object learns from one sequence of norms, so every set of gradients that is clipped together
    gets its own copy.  A few sets in host memory have ``Objects``.  Many sets, or sets whose norms are on a
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
        self._learners: Objects | Rows = Objects({})
        # The object of the only set, for the kernel's hook: in a training step each look-up counts.
        self._only: Learned | None = None
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
            self._before_round = copy.copy(self)
            self._before_round._learners = self._learners.copied()

    def before_round(self) -> ThresholdBank:
        """A bank with what this one had learned when ``begin_round`` was last called."""
        return self if self._before_round is None else self._before_round

    def add(self, names: Iterable[str]) -> None:
        """Add sets with these names that do not exist yet; they start from ``max_norm``."""
        new = [name for name in names if name not in self._learners.sets]
        if self.learns and new:
            self._learners.add({name: copy.deepcopy(self._max_norm) for name in new})

    @property
    def thresholds(self) -> Mapping[str, Threshold]:
        """The threshold objects with what they have learned, by set name.  Waits for an accelerator."""
        return MappingProxyType(self._learners.thresholds)

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
        selected = tuple(names)
        if selected != self._learners.selected:
            self.add(names)
            self._learners.selected = None
        learners = self._learners_for(norms)
        if learners.selected is None:
            learners.select(selected)
        taken: Any = norms if learners.device is not None else scalars.numbers(norms)
        max_norms = learners.update(taken, norm_type)
        if self.runs_user_code:
            called = f"{type(self._max_norm).__name__}.update()"
            return [arguments.threshold(called, answer) for answer in max_norms]
        return max_norms

    def _learners_for(self, norms: Norms) -> Objects | Rows:
        """What learns from the norms, made from what was learned elsewhere if needed."""
        learners = self._learners
        device = norms.device if self.answers_tensors and not isinstance(norms, list) else None
        many = self.per_parameter or len(learners.sets) >= _MANY
        takes_rows = device is not None or (self._takes_rows_on_host and many)
        if isinstance(learners, Rows) != takes_rows or learners.device != device:
            thresholds = learners.thresholds
            learners = self._learners = Rows(thresholds, device) if takes_rows else Objects(thresholds)
            self._only = None
        return learners

    def max_norm_of_all(self, norm: float) -> float:
        """``max_norms`` for the single set ``"all"``, whose norm is a finite number in host memory.

        For the kernel's hook; only for a bank that learns, without user code.
        """
        if self._in_rounds:
            self.begin_round()
        if self._only is not None:
            max_norm: float = self._only._learn(norm, FLOATS)
            return max_norm
        (number,) = scalars.numbers(self._learned([_ALL], [norm], 2.0))
        if isinstance(self._learners, Objects):
            self._only = self._learners.thresholds[_ALL]
        return number

    def state_dict(self) -> dict[str, Any]:
        """What the threshold objects have learned, by the name of the set.  Waits for an accelerator."""
        return {name: threshold.state_dict() for name, threshold in self.thresholds.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict``; sets that are not in it start from the beginning.

        Raises:
            ValueError: if another kind of threshold has learned ``state``; then nothing has changed.
        """
        sets, self._learners, self._only = self._learners.sets, Objects(self.check(state)), None
        self.add(sets)

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


def _takes_rows(max_norm: Any, device: torch.device | None) -> bool:
    """Whether many sets can learn together whose norms are on a device (None for the host)."""
    return (
        isinstance(max_norm, Learned) and not has_own_update(type(max_norm)) and max_norm._takes_rows(device)
    )
