"""One step of a run, and reading the values of many steps from their devices at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchclip._core import arguments
from torchclip._core.collectives import raise_pending

__all__ = ["Record", "as_records", "integer", "saved_columns"]


class Record(NamedTuple):
    """One step: the norm of the gradients, and what clipping did.

    A step whose closure is called several times, such as one of LBFGS, has a record for each call.
    """

    step: int
    """The step's number."""
    total_norm: float
    """The norm of all gradients before clipping."""
    max_norm: float
    """The threshold of this step, or the smallest of several; ``inf`` if the step was only measured."""
    clip_coef: float
    """The number by which the gradients were multiplied, at most 1; with several thresholds the smallest."""
    clipped: bool
    """Whether ``clip_coef`` is below 1 and the step was taken."""
    nonfinite: bool
    """Whether ``total_norm`` is ``inf`` or ``nan``."""
    skipped: bool
    """Whether the step was skipped: parameters and optimizer state did not change."""
    loss: float | None = None
    """The loss of the step, if it is known."""


def integer(name: str, value: Any) -> int:
    """``value`` as an integer, or an error that names it."""
    return arguments.count(name, value, least=-math.inf)


def _optional_number(name: str, value: Any) -> float | None:
    return None if value is None else arguments.number(name, value)


# The types of a record's fields in a saved state, in order.
FIELD_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "step": integer,
    "total_norm": arguments.number,
    "max_norm": arguments.number,
    "clip_coef": arguments.number,
    "clipped": arguments.flag,
    "nonfinite": arguments.flag,
    "skipped": arguments.flag,
    "loss": _optional_number,
}
# Columns of only these types need no check of each value, which would take seconds for a million records.
_PLAIN_TYPES: dict[str, set[type]] = {
    "step": {int},
    "total_norm": {float},
    "max_norm": {float},
    "clip_coef": {float},
    "clipped": {bool},
    "nonfinite": {bool},
    "skipped": {bool},
    "loss": {float, type(None)},
}


def saved_columns(columns: Mapping[str, Any]) -> list[Sequence[Any]]:
    """The columns of a saved state in the order of a record's fields, or an error that names the wrong one.

    States from before records had a loss lack that column.
    """
    found: list[Sequence[Any]] = []
    for field, check in FIELD_CHECKS.items():
        name = f"state['records']['{field}']"
        values = columns[field] if field != "loss" or "loss" in columns else [None] * len(found[0])
        is_plain = type(values) is list and set(map(type, values)) <= _PLAIN_TYPES[field]
        found.append(values if is_plain else arguments.items(name, values, check))
    if len(set(map(len, found))) > 1:
        raise ValueError("`state['records']` must have columns of the same length")
    return found


def as_records(rows: Sequence[tuple[Any, ...]]) -> list[Record]:
    """The arguments of ``History.append`` as records, with one transfer for each device and dtype.

    Rows from the kernel may lack the loss.
    """
    fetched = [[*row, None] if len(row) == 5 else list(row) for row in rows]
    places: dict[tuple[torch.device, torch.dtype], list[tuple[int, int]]] = {}
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if isinstance(value, Tensor):
                places.setdefault((value.device, value.dtype), []).append((i, j))
    for where in places.values():
        values = torch.stack([rows[i][j] for i, j in where]).tolist()
        for (i, j), value in zip(where, values, strict=True):
            fetched[i][j] = value
    if places:
        raise_pending()  # because the norm is NaN if ranks are out of step
    records = []
    for (step, norm, max_norm, coef, skipped, loss), row in zip(fetched, rows, strict=True):
        if skipped and isinstance(row[4], Tensor):  # its value was not known yet when the step was recorded
            max_norm, coef = math.inf, 1.0
        clipped, nonfinite = coef < 1 and not skipped, not math.isfinite(norm)
        loss = None if loss is None else float(loss)
        records.append(Record(step, norm, max_norm, coef, clipped, nonfinite, bool(skipped), loss))
    return records
