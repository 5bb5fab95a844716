"""The thresholds of one step: those of the parameter groups, and the answer of the rule."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from torchclip._core import scalars
from torchclip._core.batch import Norms
from torchclip.clipper.scope import ClipSet, Snapshot
from torchclip.thresholds.bank import ThresholdBank

__all__ = ["StepThresholds"]


class StepThresholds:
    """The thresholds of one step, each asked for once.

    Attributes:
        runs_user_code: whether to ask for one runs code that is not ours.
    """

    def __init__(self, rule: ThresholdBank, number: int, order: float) -> None:
        self._rule, self._number, self._order = rule, number, order
        self.runs_user_code = rule.runs_user_code
        self._closed = False
        self._common: float | None = None
        # What threshold objects were asked for, and what they answered.
        self._names: Sequence[str] | None = None
        self._norms: Norms = []
        self._max_norms: Norms = []

    def close(self) -> None:
        """Refuse to ask for another one from now on."""
        self._closed = True

    def set_for(self, snapshot: Snapshot, skipped: bool | Tensor) -> bool:
        """Set the thresholds of all sets; returns whether one had to be asked for.

        Nothing is learned from a step that is skipped, which is known only on the device.
        """
        ruled = []
        for clip_set in snapshot.sets:
            if clip_set.own is None:
                ruled.append(clip_set)
            else:
                clip_set.limit(clip_set.own, scalars.EPS)
        if not ruled:
            return False
        if self._rule.learns:
            return self._set_learned(ruled, skipped, snapshot.repeats)
        asked = self._common is None
        if self._common is None:
            self._common = float(self._rule.max_norms(self._number, ["all"], [0.0])[0])
        for clip_set in ruled:
            clip_set.limit(self._common, scalars.EPS)
        return asked

    def _set_learned(self, sets: Sequence[ClipSet], skipped: bool | Tensor, repeats: bool) -> bool:
        """Set what threshold objects answer, which may be the norm itself: it is met exactly."""
        names = [name for clip_set in sets for name in clip_set.names()] if len(sets) > 1 else sets[0].names()
        norms = scalars.concatenate([clip_set.norms for clip_set in sets])
        if isinstance(skipped, Tensor) and isinstance(norms, Tensor):
            norms = norms.masked_fill(skipped.to(norms.device), math.nan)
        if repeats and self._rule.per_parameter and isinstance(norms, list):
            # AdaGC joins the norms in its warm-up, where a gradient that several optimizers have counts once.
            seen: set[int] = set()
            norms = list(norms)
            for i, grad in enumerate(grad for clip_set in sets for grad in clip_set.batch.all):
                if id(grad) in seen:
                    norms[i] = scalars.ABSENT
                seen.add(id(grad))
        asked = self._names is None
        if self._names is None:
            max_norms = self._asked(names, norms)
            self._names, self._norms, self._max_norms = names, norms, max_norms
        else:
            asked, max_norms = self._again(names, norms)
        start = 0
        for clip_set in sets:
            end = start + len(clip_set.norms)
            clip_set.limit(max_norms[start:end], 0.0)
            start = end
        return asked

    def _asked(self, names: Sequence[str], norms: Norms) -> Norms:
        if isinstance(norms, Tensor) or not norms or min(norms) >= 0:
            return self._rule.max_norms(self._number, names, norms, self._order)
        # Where there is no gradient, no threshold begins to learn.
        present = [i for i, norm in enumerate(norms) if not norm < 0]
        max_norms = [math.inf] * len(norms)
        if present:
            names_there, norms_there = [names[i] for i in present], [norms[i] for i in present]
            answers = self._rule.max_norms(self._number, names_there, norms_there, self._order)
            for i, answer in zip(present, scalars.numbers(answers), strict=True):
                max_norms[i] = answer
        return max_norms

    def _again(self, names: Sequence[str], norms: Norms) -> tuple[bool, list[float]]:
        """The thresholds that were learned, and those of what there was nothing to learn from before."""
        before = zip(
            self._names or (), scalars.numbers(self._norms), scalars.numbers(self._max_norms), strict=True
        )
        learned = {name: max_norm for name, norm, max_norm in before if not norm < 0}
        unknown = {
            name: norm
            for name, norm in zip(names, scalars.numbers(norms), strict=True)
            if name not in learned and not norm < 0
        }
        if unknown:
            if self._closed:
                raise RuntimeError(
                    f"a gradient appeared in the middle of a step ({', '.join(unknown)}), after thresholds "
                    "had been asked for twice; set gradients before optimizer.step(). The step was called off"
                )
            answer = self._rule.max_norms(self._number, [*unknown], [*unknown.values()], self._order)
            learned.update(zip(unknown, scalars.numbers(answer), strict=True))
            self._names, self._norms, self._max_norms = [*learned], [0.0] * len(learned), [*learned.values()]
        return bool(unknown), [learned.get(name, math.inf) for name in names]
