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
_CPU = torch.device("cpu")


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
        if not is_object and hasattr(max_norm, "update") and not isinstance(max_norm, Mapping):
            raise TypeError(
                f"`{argument}` is a {type(max_norm).__name__} with update(), but without state_dict() or "
                "load_state_dict(); a threshold object needs all three"
            )
        self.number = None if is_object else arguments.threshold(argument, max_norm)
        self._max_norm: Any = max_norm if is_object else self.number
        self.eps = 0.0 if self.learns else scalars.EPS
        self.runs_user_code = is_object and not type(max_norm).__module__.startswith("torchclip.")
        self.per_parameter = self.learns and bool(getattr(max_norm, "per_parameter", False))
        ours = max_norm if isinstance(max_norm, Learned) and not has_own_update(max_norm) else None
        self.answers_tensors = ours is not None and ours._takes_rows(on_device=True)
        self._takes_rows_on_host = ours is not None and ours._takes_rows(on_device=False)
        self._learners: Objects | Rows = Objects({})
        self._before_round: Objects | Rows | None = None
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Have each set's threshold asked for once from now on, for the step of this number."""
        self.asked, self._step, self._closed = 0, step, False
        self._common: float | None = None
        # The names and norms of the sets that were asked for, and their thresholds.
        self._answers: list[tuple[Sequence[str], Norms, Norms]] = []

    def close(self) -> None:
        """Refuse sets that had no gradient before, for the rest of the step."""
        self._closed = True

    def begin_round(self) -> None:
        """Record what was learned before a round of several optimizers, for a state saved during it."""
        if self.learns and self._in_rounds:
            self._before_round = self._learners.copied()

    def add(self, names: Iterable[str]) -> None:
        """Add sets with these names that do not exist yet; they start from ``max_norm``."""
        known = self._learners.names
        new = [name for name in names if name not in known]
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
        if not self._answers:
            return self._learned(names, norms, norm_type)
        # The thresholds that were learned, and those of sets of which there was no norm before.
        known = {
            name: max_norm
            for of_names, *of_each in self._answers
            for name, norm, max_norm in zip(of_names, *map(scalars.numbers, of_each), strict=True)
            if not norm < 0
        }
        found = zip(names, scalars.numbers(norms), strict=True)
        new = {name: norm for name, norm in found if not (norm < 0 or name in known)}
        if new and self._closed:
            raise RuntimeError(
                f"a gradient appeared in the middle of a step ({', '.join(new)}), after thresholds "
                "had been asked for twice; set gradients before optimizer.step(). The step was called off"
            )
        if new:
            learned = self._learned([*new], [*new.values()], norm_type)
            known.update(zip(new, scalars.numbers(learned), strict=True))
        return [known.get(name, math.inf) for name in names]

    def _called(self) -> float:
        self.asked += 1
        return arguments.threshold(f"{self._argument}({self._step})", self._max_norm(self._step))

    def _learned(self, names: Sequence[str], norms: Norms, norm_type: float) -> Norms:
        if not names:
            return norms
        self.asked += 1
        self.add(names)
        max_norms = self._learners_for(norms).update(names, norms, norm_type)
        if self.runs_user_code:
            called = f"{type(self._max_norm).__name__}.update()"
            max_norms = [arguments.threshold(called, answer) for answer in max_norms]
        self._answers.append((names, norms, max_norms))
        return max_norms

    def _learners_for(self, norms: Norms) -> Objects | Rows:
        """What learns from the norms.

        It becomes rows when there are many sets, or when norms are first on a device.  Rows stay rows, and
        move only if norms are on another device.
        """
        learners = self._learners
        if isinstance(norms, list):
            many = self.per_parameter or len(learners.names) >= _MANY
            device = learners.device or (_CPU if many and self._takes_rows_on_host else None)
        else:
            device = norms.device if self.answers_tensors else None
        if device is not None and device != learners.device:
            learners = self._learners = Rows(learners.thresholds, device)
        return learners

    def max_norm_of_all(self, norm: float) -> float:
        """``max_norms`` for the single set ``"all"``, whose norm is a finite number in host memory.

        For the kernel's hook; only for a bank that learns, without user code.
        """
        if self._in_rounds:
            self.begin_round()
        learners = self._learners
        if isinstance(learners, Objects):
            max_norm: float = learners.thresholds[_ALL]._learn(norm, FLOATS)
            return max_norm
        (number,) = learners.update([_ALL], [norm], 2.0)
        return number

    def state_dict(self, in_round: bool = False) -> dict[str, Any]:
        """What the threshold objects have learned, by the name of the set.  Waits for an accelerator.

        Args:
            in_round: whether a round is open: then it is what they had learned when ``begin_round`` was last
                called.
        """
        before = self._before_round if in_round else None
        thresholds = (self._learners if before is None else before).thresholds
        return {name: threshold.state_dict() for name, threshold in thresholds.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict``; sets that are not in it start from the beginning.

        Raises:
            ValueError: if another kind of threshold has learned ``state``; then nothing has changed.
        """
        names, self._learners = self._learners.names, Objects(self.check(state))
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
