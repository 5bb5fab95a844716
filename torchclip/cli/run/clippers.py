"""The Clippers of a trial, and which of a program's optimizers step together."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from torch.optim import LBFGS, Optimizer

from torchclip.cli.run.losses import LossRecorder
from torchclip.cli.run.optimizer import OptimizerRecord
from torchclip.cli.run.trial import Trial
from torchclip.cli.thresholds import max_norm_of
from torchclip.clipper import backward, registry
from torchclip.clipper.clipper import Clipper
from torchclip.clipper.optimizers import parameters_of
from torchclip.clipper.round import nonzero
from torchclip.clipper.settings import takes_hooks
from torchclip.clipper.step import Member


class TrialClippers:
    """The Clippers of a trial: one for each optimizer without one, or for several that step together.

    Clippers that the program makes itself get the trial's thresholds.

    Args:
        trial: the clipping to try.
        losses: knows the backward passes, and which gradients are multiplied by a GradScaler's scale.
        stepped: the optimizers that have stepped, by their ``id``.
    """

    def __init__(self, trial: Trial, losses: LossRecorder, stepped: Mapping[int, OptimizerRecord]) -> None:
        self._trial, self._losses, self._stepped = trial, losses, stepped
        self._held: WeakKeyDictionary[Optimizer, _TrialClipper] = WeakKeyDictionary()
        # Their gradients come from no backward pass that was recorded.
        self._earlier: WeakSet[Optimizer] = WeakSet()

    def __contains__(self, optimizer: Optimizer) -> bool:
        return optimizer in self._held

    def attach(self) -> Callable[[], None]:
        """Adjust Clippers from now on; returns a function that ends this."""
        if self._trial.clips:
            self._earlier.update(_with_gradients())
        return registry.set_adjustment(self._adjusted)

    def _adjusted(self, optimizer: Any, max_norm: Any, nonfinite: Any) -> tuple[Any, Any]:
        """The ``max_norm`` and ``nonfinite`` of the program's own Clipper, which replaces the trial's."""
        for each in optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]:
            if isinstance(each, Optimizer) and each in self._held:
                clipper = self._held[each]
                others = [other for other in self._remove(clipper) if other is not each]
                self._replace(clipper, [[other] for other in others])
        trial = self._trial
        if trial.replaces:
            ceiling = math.inf if trial.max_norm is None else trial.max_norm
            max_norm = max_norm_of(trial.threshold or "fixed", ceiling)
        return max_norm, trial.nonfinite or nonfinite

    def _remove(self, clipper: Clipper) -> list[Optimizer]:
        """Remove a Clipper; returns its optimizers that still exist."""
        clipper.detach()
        optimizers = [each for each, its_own in self._held.items() if its_own is clipper]
        for each in optimizers:
            del self._held[each]
        return optimizers

    def add(self, optimizer: Optimizer) -> str | None:
        """Give an optimizer a Clipper before its first step.

        Returns:
            Why it gets none, if so.
        """
        if self._trial.replaces:
            for group in optimizer.param_groups:
                if group.get("max_norm") is not None:
                    del group["max_norm"]
        if self._trial.clips:
            try:
                if registry.clipper_of(optimizer) is None:
                    self._make([optimizer, *self._companions(optimizer)])
            except (TypeError, ValueError) as error:
                return _not_clipped(error)
        return None

    def _companions(self, optimizer: Optimizer) -> list[Optimizer]:
        """Others that have gradients and have never stepped, and so probably step with this one."""
        if not _can_join(optimizer) or backward.is_running() or _divides_by_scale(optimizer):
            return []
        # An optimizer that wraps another has the same parameters.
        waiting = [each for each, clipper in self._held.items() if clipper.is_waiting(each)]
        known = set(map(id, parameters_of(optimizer, *waiting)))
        # One that stands for another, as in Lightning, has its groups, and never steps itself.
        records = self._stepped.values()
        stepped = {id(group) for each in records for group in getattr(each.optimizer(), "param_groups", ())}
        found = []
        for each in _with_gradients():
            is_known = each is optimizer or not stepped.isdisjoint(map(id, each.param_groups))
            if is_known or each in registry.clippers or each in self._earlier:
                continue
            theirs = set(map(id, parameters_of(each)))
            if known.isdisjoint(theirs) and not self._losses.is_scaled(each):
                found.append(each)
                known |= theirs
        return found

    def _make(self, optimizers: Sequence[Optimizer]) -> Clipper:
        clipper = _TrialClipper(optimizers)
        self._held.update(dict.fromkeys(optimizers, clipper))
        return clipper

    def begin_step(self, optimizer: Optimizer, has_closure: bool) -> str | None:
        """Begin a step; optimizers that prove not to step together get other Clippers.

        Args:
            optimizer: the optimizer that steps.
            has_closure: whether the step has a closure, which may compute other gradients.

        Returns:
            Why it is not clipped as it should be, if so.
        """
        try:
            clipper = self._held.get(optimizer)
            if clipper is None or clipper.round is None:
                return None
            apart = clipper.round.begin_step(optimizer, self._losses.backwards, has_closure)
            if not apart:
                return None
            if clipper.is_running():  # within another one's step, at whose end this is done
                clipper.round.waiting.discard(id(optimizer))
                return None
            optimizers = self._remove(clipper)
            together = [each for each in optimizers if id(each) not in apart]
            self._replace(clipper, [together, *([each] for each in optimizers if id(each) in apart)])
            if optimizer not in self._held:
                self._make([optimizer, *self._companions(optimizer)])
            return self.begin_step(optimizer, has_closure)
        except Exception as error:  # the program must continue
            return _not_clipped(error)

    def _replace(self, clipper: _TrialClipper, parts: Iterable[Sequence[Optimizer]]) -> None:
        """Make Clippers of some of the optimizers each, with its records, in place of one that was removed.

        An optimizer that has not stepped yet gets one before its first step, perhaps with others.
        """
        last = clipper.last
        for part in parts:
            if any(not clipper.is_waiting(each) for each in part):
                made = self._make(part)
                if last is not None:
                    records = {"steps": last.step + 1, "history": clipper.history.state_dict()}
                    made.load_state_dict({**made.state_dict(), "sets": [], "thresholds": {}, **records})

    def end_step(self, optimizer: Optimizer) -> str | None:
        """End a step.

        Returns:
            Why the optimizer is no longer clipped, if so.
        """
        clipper = self._held.get(optimizer)
        if clipper is None:
            return None
        if clipper.round is not None:
            clipper.round.end_step(optimizer)
        if clipper.error is not None and not clipper.is_running():
            optimizers = self._remove(clipper)
            if clipper.round is None:
                return _not_clipped(clipper.error)
            self._replace(clipper, [[each] for each in optimizers])
        return None


class _TrialClipper(Clipper):
    """A Clipper that leaves the program's steps as they are if it cannot clip their gradients.

    Attributes:
        error: why it could not.
        round: which of several optimizers have stepped; None if there is only one.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.error: Exception | None = None
        self.round = _TrialRound(optimizers) if len(optimizers) > 1 else None
        super().__init__(optimizers, math.inf)  # which is adjusted

    def _before_step(self, *step: Any) -> Any:
        try:
            return super()._before_step(*step)
        except Exception as error:
            if self._settings.nonfinite == "error":  # as asked
                raise
            self.error = error
            return None

    def is_running(self) -> bool:
        """Whether the caller is called from within a step."""
        return self._round.is_running()

    def is_waiting(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer has not stepped yet."""
        return self.round is not None and id(optimizer) in self.round.waiting


def _not_clipped(error: Exception) -> str:
    return f"not clipped as asked: {error}"


def _with_gradients() -> Iterator[Optimizer]:
    """The optimizers that have gradients and can have a Clipper together with others."""
    for each in gc.get_objects():
        is_one = issubclass(type(each), Optimizer) and _can_join(each)
        if is_one and any(parameter.grad is not None for parameter in parameters_of(each)):
            yield each


def _can_join(optimizer: Optimizer) -> bool:
    """Whether an optimizer can have a Clipper together with others."""
    is_hashable = type(optimizer).__hash__ is not None
    return is_hashable and not isinstance(optimizer, LBFGS) and takes_hooks(optimizer)


def _divides_by_scale(optimizer: Optimizer) -> bool:
    """Whether an optimizer's step divides the gradients by a GradScaler's scale."""
    return getattr(optimizer, "grad_scale", None) is not None


class _TrialRound:
    """Which optimizers of one Clipper have stepped with the current gradients.

    Args:
        optimizers: those of the Clipper.

    Attributes:
        waiting: the ``id`` of each that has not stepped yet.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._members = {id(each): Member(ref(each)) for each in optimizers}
        self.waiting = set(self._members)
        self._stepped: set[int] = set()
        self._backwards = 0
        self._is_marked = False  # not before a step has ended in this round

    def begin_step(self, optimizer: Optimizer, backwards: int, has_closure: bool) -> Container[int]:
        """Begin a step.

        Returns:
            The ``id`` of each optimizer that does not step with the others: of those that have never stepped
            if this is one of them and has other gradients than those that were clipped, or if only the others
            have new gradients; or of all if only this one has new gradients.
        """
        key = id(optimizer)
        if self._stepped:
            is_late = key not in self._stepped and self._has_others(optimizer, backwards, has_closure)
            if is_late and key in self.waiting:
                return {*self.waiting}
            is_new = (is_late or self.waiting) and any(map(self._changed, self._stepped))
            # If one that has stepped also has new gradients, it steps less often than this one.
            if is_late and not is_new:
                return self._members
            unchanged = {each for each in self.waiting - {key} if not self._changed(each)}
            if is_new and unchanged:
                return unchanged
            if is_late or key in self._stepped:
                self._stepped = set()
        if not self._stepped:
            self._backwards, self._is_marked = backwards, False
        self._stepped.add(key)
        self.waiting.discard(key)
        return ()

    def _has_others(self, optimizer: Optimizer, backwards: int, has_closure: bool) -> bool:
        """Whether an optimizer steps, or may step, with other gradients than those that were clipped."""
        is_later = backwards != self._backwards and (has_closure or not self._is_marked)
        changed = self._is_marked and self._changed(id(optimizer))
        return is_later or changed or _divides_by_scale(optimizer) or backward.is_running()

    def _changed(self, key: int) -> bool:
        """Whether gradients have changed since the last step, not only to 0."""
        return nonzero(self._members[key].changed())

    def end_step(self, optimizer: Optimizer) -> None:
        """Record the gradients with which an optimizer has stepped, and those of the others."""
        if id(optimizer) in self._stepped:  # another step within this one may have begun a new round
            for key in {id(optimizer)} | (self._members.keys() - self._stepped):
                self._members[key].mark(sample=True)
            self._is_marked = True
