"""The thresholds of all sets of gradients that are clipped together, with one interface."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from torchclip._core import arguments, scalars
from torchclip._core.batch import Norms
from torchclip.thresholds.base import MaxNorm, Threshold
from torchclip.thresholds.learned import Learned, Objects, Rows, has_own_update
from torchclip.thresholds.quantile_tracker import QuantileTracker

# From this many sets in host memory on, one formula for all of them is faster than a call for each.
_MANY = 16
_CPU = torch.device("cpu")


class ThresholdBank:
    """One interface to what a user passes as ``max_norm``: a number, a callable or a threshold object.

    A threshold object learns from one sequence of norms, so every set of gradients that is clipped together
    gets its own copy.  A few sets in host memory have ``Objects``.  Many sets, or sets whose norms are on a
    device, share ``Rows``, if the threshold supports them.

    A Clipper uses a bank in each training step:

        bank.begin_step()
        max_norms = bank.max_norms(names, norms, norm_type, step)
        clip_coefs = scalars.clip_coefs(max_norms, norms, bank.eps)

    All sets are passed in one call, because some thresholds join their norms.  Norms on a device are passed
    as one tensor.  The host does not wait for it if the bank ``answers_tensors``.

    Args:
        max_norm: the threshold.
        argument: its name in errors.

    Attributes:
        given: the threshold as it was passed; a number is a float.
        number: the threshold, if it is a number.
        learns: whether it is a threshold object, which must be asked in every step.
        eps: what is added to the norm in the clip coefficient: 1e-6 as in torch, but nothing for a threshold
            object, whose answer may be the norm itself.
        per_parameter: whether it is a threshold for single parameters (AdaGC): the clipper then measures the
            norm of each of them, whatever its scope.
        is_ours: whether it is a number or an object of this package, and not the user's own code.
        answers_tensors: whether it returns a tensor of thresholds for a tensor of norms, without waiting.
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
        # Checked once: checking a protocol takes longer than the rest of a small step.
        self.learns = isinstance(max_norm, Threshold)
        is_object = self.learns or callable(max_norm)
        if not is_object and hasattr(max_norm, "update") and not isinstance(max_norm, Mapping):
            raise TypeError(
                f"`{argument}` is a {type(max_norm).__name__} with update(), but without state_dict() or "
                "load_state_dict(); a threshold object needs all three"
            )
        self.number = None if is_object else arguments.threshold(argument, max_norm)
        self.given: Any = max_norm if is_object else self.number
        self.eps = 0.0 if self.learns else scalars.EPS
        self.per_parameter = self.learns and bool(getattr(max_norm, "_per_parameter", False))
        ours = max_norm if isinstance(max_norm, Learned) and not has_own_update(max_norm) else None
        self.is_ours = not is_object or type(max_norm).__module__.startswith("torchclip.")
        self.answers_tensors = ours is not None and ours._takes_rows(on_device=True)
        self._takes_rows_on_host = ours is not None and ours._takes_rows(on_device=False)
        self._learners: Objects | Rows = Objects({})
        self._before: Objects | Rows = self._learners
        self._latest: Sequence[str] = ()

    def begin_step(self) -> None:
        """Keep what was learned so far, for a state that is saved during the step."""
        if self.learns:
            self._before = self._learners.copied()

    def add(self, names: Iterable[str]) -> None:
        """Add sets with these names that do not exist yet; they start from ``max_norm``."""
        known = self._learners.names
        new = [name for name in names if name not in known]
        if self.learns and new:
            self._learners.add({name: copy.deepcopy(self.given) for name in new})

    @property
    def thresholds(self) -> Mapping[str, Threshold]:
        """The threshold objects with what they have learned, by set name.  Waits for an accelerator."""
        return MappingProxyType(self._learners.thresholds)

    def max_norms(
        self, names: Sequence[str], norms: Norms, norm_type: float = 2.0, step: int = 0
    ) -> float | Norms:
        """This step's threshold for each of the sets with these names and norms.

        Args:
            names: the names of the sets, which do not matter for a number or a callable.
            norms: their norms, or ``ABSENT`` for a set without a gradient, from which nothing is learned.
            norm_type: the order of the norms.
            step: the number of the step, for a callable.

        Returns:
            One threshold for all sets if it is a number or a callable.  Otherwise a tensor if ``norms`` is a
            tensor and the bank ``answers_tensors``, or else a list.
        """
        if self.number is not None:
            return self.number
        if not self.learns:
            return self.called(step)
        if not names:
            return norms
        if names is not self._latest:  # the same list in nearly every step
            self.add(names)
            self._latest = names
        max_norms = self._learners_for(norms).update(names, norms, norm_type)
        if self.is_ours:
            return max_norms
        called = f"{type(self.given).__name__}.update()"
        return [arguments.threshold(called, answer) for answer in scalars.numbers(max_norms)]

    def called(self, step: int) -> float:
        """What a callable answers for the number of a step."""
        answer = self.given(step)
        if type(answer) is float and answer >= 0:
            return answer
        return arguments.threshold(f"{self._argument}({step})", answer)

    def _learners_for(self, norms: Norms) -> Objects | Rows:
        """What learns from the norms.

        It becomes rows when there are many sets, or when the norms are on a device.  It stays rows then, and
        they move if later norms are on another device.
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

    def state_dict(self, ended: bool = True) -> dict[str, Any]:
        """What the threshold objects have learned, by the name of the set.  Waits for an accelerator.

        Args:
            ended: whether the last step counts; otherwise what they had learned before it.
        """
        thresholds = (self._learners if ended else self._before).thresholds
        return {name: threshold.state_dict() for name, threshold in thresholds.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict``; sets that are not in it start from the beginning.

        Raises:
            ValueError: if ``state`` is that of another kind of threshold; nothing changes.
        """
        names, self._learners, self._latest = self._learners.names, Objects(self.check(state)), ()
        self.add(names)

    def check(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The thresholds of a ``state_dict``; raises for anything else."""
        if state and not self.learns:
            raise ValueError(
                f"`state` holds what a threshold object learned, but `{self._argument}` is "
                f"{self.given!r}; pass the same kind of threshold object as in the saved run"
            )
        objects: dict[str, Any] = {name: copy.deepcopy(self.given) for name in state}
        for name, threshold in objects.items():
            threshold.load_state_dict(state[name])
        return objects

    def __repr__(self) -> str:
        return repr(self.given)
