"""How far steps move each parameter, compared with its norm, in some of the steps."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torchclip._core import arguments
from torchclip.history.records import integer, numbers

Array = NDArray[Any]

_MOST, _LEAST = 1e-1, 1e-6
"""Updates beyond these shares of the weights are too large, or too small."""
_SAMPLES = 5
_SHOWN = 3


class Update(NamedTuple):
    """How far a step moved a parameter."""

    step: int
    """The step's number."""
    weight: float
    """The norm of the parameter before the step."""
    update: float
    """The norm of what the step added to it."""
    ratio: float
    """``update / weight``; ``inf`` for a change of a parameter that was 0, and 0 without a change."""


class UpdateRow(NamedTuple):
    """The parameters of one optimizer in one step, and two norms of each."""

    step: int
    names: Sequence[str]
    weights: Tensor | list[float]
    updates: Tensor | list[float]


def by_name(rows: Sequence[UpdateRow]) -> dict[str, list[Update]]:
    """The updates of each parameter, oldest first.  Waits for an accelerator."""
    weights, updates = (numbers(row[i] for row in rows) for i in (2, 3))
    found: dict[str, list[Update]] = {}
    for row, of_weights, of_updates in zip(rows, weights, updates, strict=True):
        for name, weight, update in zip(row.names, of_weights, of_updates, strict=True):
            weight, update = max(weight, 0.0), max(update, 0.0)
            ratio = update / weight if weight else math.inf if update else 0.0
            found.setdefault(name, []).append(Update(row.step, weight, update, ratio))
    return found


def ratios(updates: Mapping[str, Sequence[Update]], names: Sequence[str], steps: Sequence[int]) -> Array:
    """The ratios as an array of shape ``(steps, parameters)``; 0 where there is none."""
    found = np.zeros((len(steps), len(names)))
    row_of = {step: row for row, step in enumerate(steps)}
    for column, name in enumerate(names):
        for update in updates.get(name, ()):
            if update.step in row_of:
                found[row_of[update.step], column] = update.ratio
    return found


def saved(rows: Sequence[UpdateRow]) -> list[list[Any]]:
    """The rows as plain data."""
    return [
        [step, list(names), weights, updates]
        for (step, names, _, _), weights, updates in zip(
            rows, numbers(row.weights for row in rows), numbers(row.updates for row in rows), strict=True
        )
    ]


def loaded(state: Any) -> list[UpdateRow]:
    """The result of ``saved``, or an error that names what is wrong."""
    name = "state['layers']['updates']"
    return arguments.items(name, state, _row)


def _row(name: str, value: Any) -> UpdateRow:
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        raise TypeError(
            f"`{name}` must be a step, names, norms of weights and of updates, got {arguments.shown(value)}"
        )
    step, names, *norms = value
    called = arguments.items(name, names, arguments.string)
    weights, updates = (arguments.items(name, each, arguments.number) for each in norms)
    if not len(called) == len(weights) == len(updates):
        raise ValueError(f"`{name}` must have two norms for each of the names")
    return UpdateRow(integer(name, step), tuple(called), weights, updates)


def kept(rows: Sequence[UpdateRow], steps: Collection[int]) -> list[UpdateRow]:
    """The rows of some steps."""
    return [row for row in rows if row.step in steps]


def updates_note(updates: Mapping[str, Sequence[Update]], first: int) -> Iterator[str]:
    """Which parameters move too far for good, or hardly at all.

    Args:
        updates: the updates of each parameter.
        first: the number of the first step after the warm-up.
    """
    for is_wrong, words, remedy in (
        (lambda ratio: ratio > _MOST, "more than a tenth of its norm", "lower its learning rate"),
        (
            lambda ratio: ratio < _LEAST,
            "less than a millionth of its norm",
            "raise its learning rate, or keep it in a wider dtype",
        ),
    ):
        found = {}
        for name, every in updates.items():
            ratio = [each.ratio for each in every if each.step >= first and each.weight and each.update]
            # Its last samples, at least half of them, show that it does not pass.
            lately = ratio[len(ratio) // 2 :]
            if len(ratio) >= _SAMPLES and all(map(is_wrong, lately)):
                found[name] = float(np.median(lately))
        if found:
            shown = ", ".join(f"{name} ({ratio:.2g})" for name, ratio in [*found.items()][:_SHOWN])
            more = f" and {len(found) - _SHOWN:,} more" if len(found) > _SHOWN else ""
            yield f"Updates: each step moves {shown}{more} by {words}: {remedy}."
