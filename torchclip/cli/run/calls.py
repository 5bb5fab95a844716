"""Calls of torch's clipping functions, kept until the optimizer whose gradients they clipped steps."""

from __future__ import annotations

import math
from collections.abc import KeysView, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import ref

from torch import Tensor

from torchclip._core.batch import Norm
from torchclip._core.joint_norms import join
from torchclip.history.history import History

# That wait: parameters, each counted once for each set that was clipped; and calls on the same parameters.
_MOST_PARAMETERS, _MOST_CALLS = 100_000, 64


class Call(NamedTuple):
    """What clipping did to gradients.

    Attributes:
        function: the function's name.
        total_norm: the norm before clipping.
        max_norm: the threshold.
        clip_coef: the number by which they were multiplied.
        nonfinite: the ``id`` of each parameter whose gradient was not finite.
        not_taken: calls on the same parameters that were not followed by a step.
    """

    function: str
    total_norm: Norm
    max_norm: float
    clip_coef: Norm
    nonfinite: Sequence[int] = ()
    not_taken: Sequence[Call] = ()

    @property
    def numbers(self) -> tuple[Norm, float, Norm]:
        """What a record has of it: total norm, threshold, clip coefficient."""
        return self.total_norm, self.max_norm, self.clip_coef


@dataclass
class _Waiting:
    """A call that waits.

    Attributes:
        call: the call.
        left: the ``id`` of each parameter whose optimizer has not stepped since then.
        is_taken: whether an optimizer has stepped since then.
    """

    call: Call
    left: set[int]
    is_taken: bool = False


@dataclass
class _Place:
    """The calls on the same parameters.

    Attributes:
        first: the first parameter; if it is gone, another one may have its ``id``.
        waiting: the calls, oldest first.
    """

    first: ref[Tensor]
    waiting: list[_Waiting]


class Calls:
    """Assigns calls to optimizers by their parameters.

    A call may clip the parameters of several optimizers together, and several calls may clip those of one
    optimizer, each with its own threshold.

    Attributes:
        stray: calls on parameters of which no optimizer has ever stepped.
        known: the ``id`` of each parameter of an optimizer that has stepped.
    """

    def __init__(self) -> None:
        self.stray = History()
        self.known: set[int] = set()
        self._places: dict[frozenset[int], _Place] = {}
        self._parameters = 0  # of all places
        self._strays = 0

    def add(self, parameters: Sequence[Tensor], call: Call) -> None:
        """Keep a call until its optimizers step."""
        if not parameters:
            return self._add_stray(call)
        ids = frozenset(map(id, parameters))
        place = self._places.get(ids)
        if place is not None and place.first() is None:
            self._drop(ids)
            place = None
        if place is None:
            place = self._places[ids] = _Place(ref(parameters[0]), [])
            self._parameters += len(ids)
            while self._parameters > _MOST_PARAMETERS and len(self._places) > 1:
                self._drop(next(iter(self._places)))
        # After a step, a call waits for optimizers that have stepped before, not for other parameters.
        place.waiting = [
            each for each in place.waiting if not (each.is_taken and each.left.isdisjoint(self.known))
        ]
        place.waiting.append(_Waiting(call, set(ids)))
        if len(place.waiting) > _MOST_CALLS:
            oldest = place.waiting.pop(0)
            if ids.isdisjoint(self.known):
                self._add_stray(oldest.call)
        return None

    def _drop(self, ids: frozenset[int]) -> None:
        """Remove the calls on some parameters; they are strays if no optimizer has ever stepped."""
        place = self._places.pop(ids)
        self._parameters -= len(ids)
        if ids.isdisjoint(self.known):
            for each in place.waiting:
                self._add_stray(each.call)

    def finish(self) -> None:
        """Remove all calls, as no optimizer will step any more."""
        for ids in [*self._places]:
            self._drop(ids)

    def _add_stray(self, call: Call) -> None:
        self.stray.append(self._strays, *call.numbers)
        self._strays += 1

    def take(self, parameters: KeysView[int]) -> Call | None:
        """The joint effect of the calls on an optimizer's gradients since its last step; None without any.

        Args:
            parameters: the ``id`` of each of its parameters.
        """
        not_taken: list[Call] = []
        calls = []
        for ids, place in [*self._places.items()]:
            if place.first() is None:
                self._drop(ids)
                continue
            own = [each for each in place.waiting if not parameters.isdisjoint(each.left)]
            if not own:
                continue
            calls.append(_in_one_step([each.call for each in own], not_taken))
            for each in own:
                each.is_taken = True
                each.left -= parameters
            place.waiting = [each for each in place.waiting if each.left]
            if not place.waiting:
                self._drop(ids)
        if len(calls) < 2 and not not_taken:
            return calls[0] if calls else None
        return Call(
            " and ".join(dict.fromkeys(call.function for call in calls)),
            join([call.total_norm for call in calls], 2.0),
            min(call.max_norm for call in calls),
            join([call.clip_coef for call in calls], -math.inf),
            [key for call in calls for key in call.nonfinite],
            not_taken,
        )


def _in_one_step(calls: list[Call], not_taken: list[Call]) -> Call:
    """Several calls on the same parameters: the last one, or their joint effect.

    A GradScaler skips steps whose gradients are not finite: such calls, except the last one, go to
    ``not_taken``.
    """
    *earlier, last = calls
    for call in earlier:
        if isinstance(call.total_norm, float) and not math.isfinite(call.total_norm):
            not_taken.append(call)
        else:
            last = last._replace(
                total_norm=join([call.total_norm, last.total_norm], math.inf),
                max_norm=min(call.max_norm, last.max_norm),
                clip_coef=call.clip_coef * last.clip_coef,
            )
    return last
