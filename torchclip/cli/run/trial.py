"""The clipping that a user tries in one run, instead of the program's own."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from torch.optim import LBFGS, Optimizer

from torchclip.cli.thresholds import max_norm_of
from torchclip.clipper import registry
from torchclip.clipper.clipper import Clipper, Nonfinite
from torchclip.clipper.optimizers import parameters_of
from torchclip.clipper.settings import takes_hooks
from torchclip.clipper.step import Member


@dataclass(frozen=True)
class Trial:
    """The clipping that the options of ``torchclip run`` describe.

    Attributes:
        max_norm: a threshold, or a ceiling for one that learns; None if not given.
        threshold: the name of a learned threshold, or None.
        nonfinite: what to do about steps that are not finite; None for the usual.
        none: whether to clip nothing.
        replaced: the program's own ways of clipping that it replaced, and how often.
    """

    max_norm: float | None = None
    threshold: str | None = None
    nonfinite: Nonfinite | None = None
    none: bool = False
    replaced: Counter[str] = field(default_factory=Counter, compare=False)

    @property
    def replaces(self) -> bool:
        """Whether it replaces the program's own thresholds."""
        return self.none or self.max_norm is not None or self.threshold is not None

    @property
    def clips(self) -> bool:
        """Whether each optimizer gets a Clipper."""
        return not self.none and (self.replaces or self.nonfinite is not None)

    def __str__(self) -> str:
        if self.none:
            return "nothing was clipped (--none)"
        options = {"max-norm": self.max_norm, "threshold": self.threshold, "nonfinite": self.nonfinite}
        given = " ".join(
            f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"
            for name, value in options.items()
            if value is not None
        )
        return f"clipped by {given}"


class TrialClippers:
    """The Clippers of a trial: one for each optimizer without one, or for several that step together.

    Clippers that the program makes itself get the trial's thresholds.
    """

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._held: WeakKeyDictionary[Optimizer, Clipper] = WeakKeyDictionary()
        self._rounds: WeakKeyDictionary[Optimizer, _Round] = WeakKeyDictionary()
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
        """The ``max_norm`` and ``nonfinite`` of a new Clipper."""
        self._remove(optimizer if isinstance(optimizer, (list, tuple)) else [optimizer])
        trial = self._trial
        if trial.replaces:
            ceiling = math.inf if trial.max_norm is None else trial.max_norm
            max_norm = max_norm_of(trial.threshold or "fixed", ceiling)
        return max_norm, trial.nonfinite or nonfinite

    def _remove(self, optimizers: Sequence[Any]) -> None:
        for optimizer in optimizers:
            if isinstance(optimizer, Optimizer) and optimizer in self._held:
                clipper = self._held[optimizer]
                for each in self._of(clipper):
                    del self._held[each]
                    self._rounds.pop(each, None)
                clipper.detach()

    def _of(self, clipper: Clipper) -> list[Optimizer]:
        """The optimizers of a Clipper that still exist."""
        return [each for each, its_own in self._held.items() if its_own is clipper]

    def add(self, optimizer: Optimizer, stepped: Container[int]) -> str | None:
        """Give an optimizer a Clipper before its first step.

        Args:
            optimizer: the optimizer.
            stepped: the ``id`` of each optimizer that has stepped.

        Returns:
            Why it gets none, if so.
        """
        if self._trial.replaces:
            for group in optimizer.param_groups:
                if group.get("max_norm") is not None:
                    del group["max_norm"]
        if self._trial.clips and registry.clipper_of(optimizer) is None:
            try:
                self._make([optimizer, *self._companions(optimizer, stepped)])
            except (TypeError, ValueError) as error:
                return f"not clipped as asked: {error}"
        return None

    def _companions(self, optimizer: Optimizer, stepped: Container[int]) -> list[Optimizer]:
        """Others that have gradients and have never stepped, and so probably step with this one."""
        own = set(map(id, parameters_of(optimizer)))
        found = []
        for each in _with_gradients():
            if each is optimizer or id(each) in stepped or each in registry.clippers or each in self._earlier:
                continue
            theirs = set(map(id, parameters_of(each)))
            if own.isdisjoint(theirs):  # an optimizer that wraps another has the same parameters
                found.append(each)
                own |= theirs
        return found

    def _make(self, optimizers: Sequence[Optimizer]) -> Clipper:
        clipper = Clipper(optimizers, math.inf)  # which is adjusted
        self._held.update(dict.fromkeys(optimizers, clipper))
        if len(optimizers) > 1:
            self._rounds.update(dict.fromkeys(optimizers, _Round(optimizers)))
        return clipper

    def begin_step(self, optimizer: Optimizer, backwards: int) -> None:
        """Begin a step; optimizers that prove not to step together get Clippers of their own.

        Args:
            optimizer: the optimizer that steps.
            backwards: how many backward passes there have been.
        """
        current = self._rounds.get(optimizer) if self._rounds else None
        if current is None:
            return
        apart = current.begin_step(optimizer, backwards)
        if apart:
            self._separate(self._held[optimizer], apart, current)
            self.begin_step(optimizer, backwards)

    def _separate(self, clipper: Clipper, apart: Container[int], current: _Round) -> None:
        """Give some optimizers of a Clipper one each; those that have stepped keep its records."""
        optimizers = self._of(clipper)
        self._remove(optimizers)
        last = clipper.last
        together = [each for each in optimizers if id(each) not in apart]
        for each in filter(None, [together, *([other] for other in optimizers if id(other) in apart)]):
            made = self._make(each)
            if last is not None and any(map(current.has_stepped, each)):
                records = {"steps": last.step + 1, "history": clipper.history.state_dict()}
                made.load_state_dict({**made.state_dict(), "sets": [], "thresholds": {}, **records})

    def end_step(self, optimizer: Optimizer) -> None:
        """Record the gradients with which an optimizer has stepped."""
        if self._rounds and optimizer in self._rounds:
            self._rounds[optimizer].end_step(optimizer)


def _with_gradients() -> Iterator[Optimizer]:
    """The optimizers that have gradients and can have a Clipper together with others."""
    for each in gc.get_objects():
        if not issubclass(type(each), Optimizer) or isinstance(each, LBFGS) or not takes_hooks(each):
            continue
        if any(parameter.grad is not None for parameter in parameters_of(each)):
            yield each


class _Round:
    """Which optimizers of one Clipper have stepped with the current gradients.

    Args:
        optimizers: those of the Clipper.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._members = {id(each): Member(ref(each)) for each in optimizers}
        self._waiting = set(self._members)  # for their first step
        self._stepped: set[int] = set()
        self._backwards = 0

    def begin_step(self, optimizer: Optimizer, backwards: int) -> Container[int]:
        """Begin a step.

        Returns:
            The ``id`` of each optimizer that does not step with the others: of all if this one's gradients
            come from another backward pass; or of those that have never stepped if only the others have new
            gradients.
        """
        key = id(optimizer)
        is_late = key not in self._stepped and backwards != self._backwards
        if self._stepped and (is_late or self._waiting):
            is_new = any(self._members[each].changed() for each in self._stepped)
            # If one that has stepped also has new gradients, it steps less often than this one.
            if is_late and not is_new:
                return self._members
            unchanged = {each for each in self._waiting - {key} if not self._members[each].changed()}
            if is_new and unchanged:
                return unchanged
        if is_late or key in self._stepped:
            self._backwards, self._stepped = backwards, set()
        self._stepped.add(key)
        self._waiting.discard(key)
        return ()

    def has_stepped(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer has stepped with the current gradients."""
        return id(optimizer) in self._stepped

    def end_step(self, optimizer: Optimizer) -> None:
        """Record the gradients with which an optimizer has stepped, and those that wait for a first step."""
        if id(optimizer) in self._stepped:  # another step within this one may have begun a new round
            for key in (id(optimizer), *self._waiting):
                self._members[key].mark(sample=False)
