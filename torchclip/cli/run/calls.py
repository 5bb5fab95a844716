"""Calls of torch's clipping functions, kept until the optimizer steps whose gradients they have clipped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchclip._core.scalars import ABSENT, join

__all__ = ["Call", "Calls"]

Number = float | Tensor


class Call(NamedTuple):
    """What clipping did to gradients.

    Attributes:
        function: by which function.
        total_norm: their norm before.
        max_norm: the threshold.
        clip_coef: what they were multiplied by.
        nonfinite: the names of parameters whose gradients were not finite.
        not_taken: calls on the same parameters that no step has followed.
    """

    function: str
    total_norm: Number
    max_norm: float
    clip_coef: Number
    nonfinite: Sequence[str] = ()
    not_taken: Sequence[Call] = ()


class Calls:
    """Assigns calls to optimizers by their parameters.

    A call may clip the parameters of several optimizers together, and an optimizer's may be clipped by several
    calls, each with a threshold of its own.
    """

    def __init__(self) -> None:
        self._owners: dict[int, Optimizer] = {}
        self._names: dict[int, str] = {}
        self._waiting: WeakKeyDictionary[Optimizer, dict[tuple[int, int], list[Call]]] = WeakKeyDictionary()
        self._unclaimed: list[tuple[list[int], Call]] = []

    def know(self, optimizer: Optimizer, names: dict[int, str]) -> None:
        """Take in whose parameters these are, and calls on them that came before."""
        self._owners.update(dict.fromkeys(names, optimizer))
        self._names.update(names)
        unclaimed, self._unclaimed = self._unclaimed, []
        for keys, call in unclaimed:
            self._assign(keys, call)

    def name(self, parameter: Tensor) -> str | None:
        """What a parameter is called, once its optimizer is known."""
        return self._names.get(id(parameter))

    def add(self, parameters: Iterable[Tensor], call: Call) -> None:
        """Keep a call until its optimizers step."""
        self._assign([id(parameter) for parameter in parameters], call)

    def _assign(self, keys: list[int], call: Call) -> None:
        owners = {self._owners[key] for key in keys if key in self._owners}
        if not owners:
            self._unclaimed = [*self._unclaimed[-7:], (keys, call)]
        for owner in owners:
            place = (keys[0], len(keys))
            self._waiting.setdefault(owner, {}).setdefault(place, []).append(call)

    def of(self, optimizer: Optimizer) -> Call | None:
        """What the calls on an optimizer's gradients did together since its last step; None without any."""
        waiting = self._waiting.pop(optimizer, None)
        if not waiting:
            return None
        not_taken: list[Call] = []
        calls = [_in_one_step(repeated, not_taken) for repeated in waiting.values()]
        if len(calls) == 1 and not not_taken:
            return calls[0]
        names = [name for call in calls for name in call.nonfinite]
        return Call(
            " and ".join(dict.fromkeys(call.function for call in calls)),
            join([call.total_norm for call in calls], 2.0) if calls else ABSENT,
            min(call.max_norm for call in calls),
            _smallest([call.clip_coef for call in calls]),
            names,
            not_taken,
        )


def _in_one_step(calls: list[Call], not_taken: list[Call]) -> Call:
    """Several calls on the same parameters: the last one, or what they did one after another.

    A GradScaler leaves a step out whose gradients are not finite: to ``not_taken`` go such calls but the last.
    """
    *earlier, last = calls
    for call in earlier:
        if call.nonfinite:
            not_taken.append(call)
        else:
            last = last._replace(
                total_norm=_largest([call.total_norm, last.total_norm]),
                max_norm=min(call.max_norm, last.max_norm),
                clip_coef=call.clip_coef * last.clip_coef,
            )
    return last


def _smallest(values: Sequence[Number]) -> Number:
    return torch.stack([torch.as_tensor(v) for v in values]).min() if _any_tensor(values) else min(values)


def _largest(values: Sequence[Number]) -> Number:
    return torch.stack([torch.as_tensor(v) for v in values]).max() if _any_tensor(values) else max(values)


def _any_tensor(values: Sequence[Number]) -> bool:
    return any(isinstance(value, Tensor) for value in values)
