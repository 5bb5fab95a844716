"""Calls of torch's clipping functions, kept until the optimizer whose gradients they clipped steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchclip._core.batch import Norm
from torchclip._core.scalars import join
from torchclip.history.history import History

__all__ = ["Call", "Calls"]


_MOST_UNCLAIMED = 8  # calls that wait for an optimizer's first step


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


class Calls:
    """Assigns calls to optimizers by their parameters.

    A call may clip the parameters of several optimizers together, and several calls may clip those of one
    optimizer, each with its own threshold.

    Attributes:
        are_waiting: whether an optimizer may have calls for its next step.
        stray: calls on parameters of which no optimizer has ever stepped.
    """

    def __init__(self) -> None:
        self._owners: WeakValueDictionary[int, Optimizer] = WeakValueDictionary()
        self._waiting: WeakKeyDictionary[Optimizer, dict[tuple[int, int], list[Call]]] = WeakKeyDictionary()
        self._unclaimed: list[tuple[list[int], Call]] = []
        self._shared: tuple[list[int], Call] | None = None
        self.stray = History()
        self.are_waiting = False
        self._strays = 0

    def register(self, optimizer: Optimizer, parameters: Iterable[int]) -> None:
        """Record whose parameters these are, by their ``id``, and assign earlier calls on them."""
        for key in parameters:
            self._owners[key] = optimizer
        if self._shared is not None and not self._unclaimed:
            keys, call = self._shared
            self._give(optimizer, keys, call)
        unclaimed, self._unclaimed = self._unclaimed, []
        for keys, call in unclaimed:
            self._assign(keys, call)

    def add(self, parameters: Iterable[Tensor], call: Call) -> None:
        """Keep a call until its optimizers step."""
        self._assign([id(parameter) for parameter in parameters], call)

    def _assign(self, keys: list[int], call: Call) -> None:
        owners = {owner for owner in map(self._owners.get, keys) if owner is not None}
        if not owners:
            self._unclaimed.append((keys, call))
            if len(self._unclaimed) > _MOST_UNCLAIMED:
                self._add_stray(self._unclaimed.pop(0)[1])
        for owner in owners:
            self._give(owner, keys, call)
        # The others may belong to an optimizer that has not stepped yet.
        self._shared = (
            (keys, call) if owners and len(keys) > sum(map(self._owners.__contains__, keys)) else None
        )

    def _give(self, owner: Optimizer, keys: list[int], call: Call) -> None:
        if any(self._owners.get(key) is owner for key in keys):
            place = (keys[0], len(keys))
            calls = self._waiting.setdefault(owner, {}).setdefault(place, [])
            if not any(each is call for each in calls):
                calls.append(call)
            self.are_waiting = True

    def finish(self) -> None:
        """Count the calls that wait for an optimizer as strays, as no optimizer will step any more."""
        for _, call in self._unclaimed:
            self._add_stray(call)
        self._unclaimed.clear()

    def _add_stray(self, call: Call) -> None:
        self.stray.append(self._strays, call.total_norm, call.max_norm, call.clip_coef)
        self._strays += 1

    def of(self, optimizer: Optimizer) -> Call | None:
        """The joint effect of the calls on an optimizer's gradients since its last step; None without any."""
        waiting = self._waiting.pop(optimizer, None)
        self.are_waiting = len(self._waiting) > 0
        if not waiting:
            return None
        not_taken: list[Call] = []
        calls = [_in_one_step(repeated, not_taken) for repeated in waiting.values()]
        if len(calls) == 1 and not not_taken:
            return calls[0]
        nonfinite = [key for call in calls for key in call.nonfinite]
        return Call(
            " and ".join(dict.fromkeys(call.function for call in calls)),
            join([call.total_norm for call in calls], 2.0),
            min(call.max_norm for call in calls),
            _smallest([call.clip_coef for call in calls]),
            nonfinite,
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
                total_norm=_largest([call.total_norm, last.total_norm]),
                max_norm=min(call.max_norm, last.max_norm),
                clip_coef=call.clip_coef * last.clip_coef,
            )
    return last


def _smallest(values: Sequence[Norm]) -> Norm:
    return torch.stack([torch.as_tensor(v) for v in values]).min() if _any_tensor(values) else min(values)


def _largest(values: Sequence[Norm]) -> Norm:
    return torch.stack([torch.as_tensor(v) for v in values]).max() if _any_tensor(values) else max(values)


def _any_tensor(values: Sequence[Norm]) -> bool:
    return any(isinstance(value, Tensor) for value in values)
