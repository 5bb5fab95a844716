"""The clipping that a user tries in one run, instead of the program's own."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref

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

    def __contains__(self, optimizer: Optimizer) -> bool:
        return optimizer in self._held

    def attach(self) -> Callable[[], None]:
        """Adjust Clippers from now on; returns a function that ends this."""
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
                self._make([optimizer, *_companions(optimizer, stepped)])
            except (TypeError, ValueError) as error:
                return f"not clipped as asked: {error}"
        return None

    def _make(self, optimizers: Sequence[Optimizer]) -> None:
        clipper = Clipper(optimizers, math.inf)  # which is adjusted
        self._held.update(dict.fromkeys(optimizers, clipper))
        if len(optimizers) > 1:
            self._rounds.update(dict.fromkeys(optimizers, _Round()))

    def begin_step(self, optimizer: Optimizer, backwards: int) -> None:
        """Give each optimizer its own Clipper if they do not step on the same backward pass.

        Args:
            optimizer: the optimizer that steps.
            backwards: how many backward passes there have been.
        """
        current = self._rounds.get(optimizer) if self._rounds else None
        if current is not None and not current.begin_step(optimizer, backwards):
            optimizers = self._of(self._held[optimizer])
            self._remove(optimizers)
            for each in optimizers:
                self._make([each])

    def end_step(self, optimizer: Optimizer) -> None:
        """Record the gradients with which an optimizer has stepped."""
        if self._rounds and optimizer in self._rounds:
            self._rounds[optimizer].end_step(optimizer)


def _companions(optimizer: Optimizer, stepped: Container[int]) -> list[Optimizer]:
    """Other optimizers that have gradients and have never stepped, and so probably step with this one."""
    own = set(map(id, parameters_of(optimizer)))
    found = []
    for each in gc.get_objects():
        if not issubclass(type(each), Optimizer) or isinstance(each, LBFGS) or not takes_hooks(each):
            continue
        if each is optimizer or id(each) in stepped or each in registry.clippers:
            continue
        theirs = parameters_of(each)
        # An optimizer that wraps another has the same parameters.
        if own.isdisjoint(map(id, theirs)) and any(parameter.grad is not None for parameter in theirs):
            found.append(each)
            own.update(map(id, theirs))
    return found


class _Round:
    """Which optimizers of one Clipper have stepped with the current gradients."""

    def __init__(self) -> None:
        self._backwards = 0
        self._stepped: dict[int, Member] = {}

    def begin_step(self, optimizer: Optimizer, backwards: int) -> bool:
        """False if the optimizer's gradients come from another backward pass than the others'."""
        is_late = id(optimizer) not in self._stepped and backwards != self._backwards
        # If one that has stepped also has new gradients, it steps less often than this one.
        if is_late and self._stepped and not any(each.changed() for each in self._stepped.values()):
            return False
        if is_late or id(optimizer) in self._stepped:
            self._backwards, self._stepped = backwards, {}
        self._stepped[id(optimizer)] = Member(ref(optimizer))
        return True

    def end_step(self, optimizer: Optimizer) -> None:
        """Record the gradients with which an optimizer has stepped."""
        member = self._stepped.get(id(optimizer))
        if member is not None:  # another step within this one may have begun a new round
            member.mark(sample=False)
