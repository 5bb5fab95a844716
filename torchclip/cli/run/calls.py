"""Calls of torch's clipping functions, kept until the optimizer whose gradients they clipped steps."""

from __future__ import annotations

import math
from collections.abc import Container, KeysView, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import ref

from torch import Tensor

from torchclip._core.batch import Norm
from torchclip._core.scalars import join
from torchclip.history.history import History

_MOST_PLACES, _MOST_CALLS = 1000, 64  # that wait: different parameters, and calls on the same ones


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
    """Calls on the same parameters.

    Attributes:
        calls: the calls since an optimizer has stepped with these gradients.
        first: the first parameter; if it is gone, another one may have its ``id``.
        left: the ``id`` of each parameter whose optimizer has not stepped yet.
        is_taken: whether an optimizer has stepped.
    """

    calls: list[Call]
    first: ref[Tensor]
    left: set[int]
    is_taken: bool = False


class Calls:
    """Assigns calls to optimizers by their parameters.

    A call may clip the parameters of several optimizers together, and several calls may clip those of one
    optimizer, each with its own threshold.

    Attributes:
        stray: calls on parameters of which no optimizer has ever stepped.
    """

    def __init__(self) -> None:
        self.stray = History()
        self._waiting: dict[frozenset[int], _Waiting] = {}
        self._strays = 0

    def add(self, parameters: Sequence[Tensor], call: Call) -> None:
        """Keep a call until its optimizers step."""
        if not parameters:
            return self._add_stray(call)
        place = frozenset(map(id, parameters))
        waiting = self._waiting.get(place)
        if waiting is None or waiting.is_taken or waiting.first() is None:
            self._drop(place)
            self._waiting[place] = _Waiting([call], ref(parameters[0]), set(place))
            if len(self._waiting) > _MOST_PLACES:
                self._drop(next(iter(self._waiting)))
            return None
        waiting.calls.append(call)
        if len(waiting.calls) > _MOST_CALLS:
            self._add_stray(waiting.calls.pop(0))
        return None

    def _drop(self, place: frozenset[int], known: Container[int] = ()) -> None:
        """Remove the calls on some parameters; they are strays if no optimizer has stepped."""
        waiting = self._waiting.pop(place, None)
        if waiting is not None and not waiting.is_taken and not any(key in known for key in place):
            for call in waiting.calls:
                self._add_stray(call)

    def finish(self, known: Container[int] = ()) -> None:
        """Remove all calls, as no optimizer will step any more.

        Args:
            known: the ``id`` of each parameter of an optimizer that has stepped, whose calls are no strays.
        """
        for place in [*self._waiting]:
            self._drop(place, known)

    def _add_stray(self, call: Call) -> None:
        self.stray.append(self._strays, *call.numbers)
        self._strays += 1

    def take(self, parameters: KeysView[int]) -> Call | None:
        """The joint effect of the calls on an optimizer's gradients since its last step; None without any.

        Args:
            parameters: the ``id`` of each of its parameters.
        """
        if not self._waiting:
            return None
        not_taken: list[Call] = []
        calls = []
        for place, waiting in [*self._waiting.items()]:
            if waiting.first() is None or parameters.isdisjoint(waiting.left):
                continue
            calls.append(_in_one_step(waiting.calls, not_taken))
            waiting.is_taken = True
            waiting.left -= parameters
            if not waiting.left:
                del self._waiting[place]
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
