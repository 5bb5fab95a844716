"""One step of a run, and how the values of many are read from their devices at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchclip._core import arguments

__all__ = ["FIELD_CHECKS", "Record", "as_records", "integer"]


class Record(NamedTuple):
    """One step: what the gradients' norm was and what was done about it.

    A step whose closure is called several times, as by LBFGS, has a record for each call.
    """

    step: int
    """The step's number, as the caller counts."""
    total_norm: float
    """The norm of all gradients before clipping."""
    max_norm: float
    """The threshold of this step, the smallest of several; ``inf`` if the step was only measured."""
    clip_coef: float
    """What the gradients were multiplied by, at most 1; with several thresholds the smallest factor."""
    clipped: bool
    """Whether ``clip_coef`` is below 1 and the step was taken."""
    nonfinite: bool
    """Whether ``total_norm`` is ``inf`` or ``nan``."""
    skipped: bool
    """Whether the step was left out: parameters and optimizer state did not change."""


def integer(name: str, value: Any) -> int:
    """``value`` as an integer, or an error that names it."""
    return arguments.count(name, value, least=-math.inf)


# What the fields of a record must be in a saved state, in order.
FIELD_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "step": integer,
    "total_norm": arguments.number,
    "max_norm": arguments.number,
    "clip_coef": arguments.number,
    "clipped": arguments.flag,
    "nonfinite": arguments.flag,
    "skipped": arguments.flag,
}


def as_records(rows: Sequence[tuple[Any, ...]]) -> list[Record]:
    """What ``History.append`` was given, as records: one transfer for each device and dtype."""
    fetched = [list(row) for row in rows]
    places: dict[tuple[torch.device, torch.dtype], list[tuple[int, int]]] = {}
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            if isinstance(value, Tensor):
                places.setdefault((value.device, value.dtype), []).append((i, j))
    for where in places.values():
        values = torch.stack([rows[i][j] for i, j in where]).tolist()
        for (i, j), value in zip(where, values, strict=True):
            fetched[i][j] = value
    for record, row in zip(fetched, rows, strict=True):
        step, norm, *_, skipped = record
        if skipped and isinstance(row[-1], Tensor):  # nobody knew when the step was recorded
            record[:] = step, norm, math.inf, 1.0, True
    return [
        Record(step, norm, max_norm, coef, coef < 1 and not skipped, not math.isfinite(norm), bool(skipped))
        for step, norm, max_norm, coef, skipped in fetched
    ]
