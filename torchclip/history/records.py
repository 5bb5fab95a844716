"""One step of a run, and reading the values of many steps from their devices at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchclip._core import arguments
from torchclip._core.collectives import raise_pending


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
    clipped_norm: float = math.nan
    """The norm of the gradients that the optimizer steps with; 0 if the step was skipped."""

    @property
    def layers(self) -> Mapping[str, float] | None:
        """The norm of each parameter's gradient before clipping, by its name; 0 without a gradient.

        In the records that ``on_clip`` gets of every ``layers_every``-th step; elsewhere None, as a history
        keeps these norms in ``history.layers``.
        """
        return None


class SampledRecord(Record):
    """A record of a step in which the norms of single parameters were measured; equal to one without."""

    _by_name: Mapping[str, float]

    @property
    def layers(self) -> Mapping[str, float]:
        """The norm of each parameter's gradient before clipping, by its name; 0 without a gradient."""
        return self._by_name


def integer(name: str, value: Any) -> int:
    """``value`` as an integer, or an error that names it."""
    return arguments.count(name, value, least=-math.inf)


def _optional_number(name: str, value: Any) -> float | None:
    return None if value is None else arguments.number(name, value)


# How the values of a record's fields in a saved state are checked.  Columns of only the types after the check
# need none for each value: for a million records it would take seconds.
_CHECKS: dict[str, tuple[Callable[[str, Any], Any], set[type]]] = {
    "step": (integer, {int}),
    **dict.fromkeys(("total_norm", "max_norm", "clip_coef"), (arguments.number, {float})),
    **dict.fromkeys(("clipped", "nonfinite", "skipped"), (arguments.flag, {bool})),
    "loss": (_optional_number, {float, type(None)}),
    "clipped_norm": (arguments.number, {float}),
}
# Earlier versions did not save these columns.
ADDED = ("loss", "clipped_norm")


def saved_columns(columns: Mapping[str, Any]) -> list[Sequence[Any]]:
    """The columns of a saved state in the order of a record's fields, or an error that names the wrong one.

    A state from before records had a loss or a clipped norm gets these columns: no loss, and the clipped norm
    of a single threshold.
    """
    found: list[Sequence[Any]] = []
    for field, (check, plain) in _CHECKS.items():
        name = f"state['records']['{field}']"
        if field in columns:
            values = columns[field]
        elif field == "loss":
            values = [None] * len(found[0])
        else:
            values = list(
                map(_clipped_norm, *(columns[each] for each in ("total_norm", "clip_coef", "skipped")))
            )
        is_plain = type(values) is list and set(map(type, values)) <= plain
        found.append(values if is_plain else arguments.items(name, values, check))
    if len(set(map(len, found))) > 1:
        raise ValueError("`state['records']` must have columns of the same length")
    return found


def numbers(values: Iterable[Any]) -> list[Any]:
    """Values with numbers in place of tensors: one transfer for each device, dtype and shape."""
    found = list(values)
    places: dict[tuple[torch.device, torch.dtype, torch.Size], list[int]] = {}
    for i, value in enumerate(found):
        if isinstance(value, Tensor):
            places.setdefault((value.device, value.dtype, value.shape), []).append(i)
    for where in places.values():
        fetched = torch.stack([found[i] for i in where]).tolist()
        for i, value in zip(where, fetched, strict=True):
            found[i] = value
    if places:
        raise_pending()  # because the norm is NaN if ranks are out of step
    return found


def as_records(rows: Sequence[tuple[Any, ...]]) -> list[Record]:
    """The arguments of ``History.append`` as records.  Rows from the kernel may lack the last ones."""
    rows = [row if len(row) == 7 else (*row, None, None)[:7] for row in rows]
    fetched = iter(numbers(chain.from_iterable(rows)))
    records = []
    for row in rows:
        step, norm, max_norm, coef, skipped, loss, clipped_norm = islice(fetched, 7)
        if skipped and isinstance(row[4], Tensor):  # its value was not known yet when the step was recorded
            max_norm, coef = math.inf, 1.0
        clipped, nonfinite = coef < 1 and not skipped, not math.isfinite(norm)
        loss = None if loss is None else float(loss)
        if clipped_norm is None or skipped:
            clipped_norm = _clipped_norm(norm, coef, skipped)
        records.append(
            Record(step, norm, max_norm, coef, clipped, nonfinite, bool(skipped), loss, float(clipped_norm))
        )
    return records


def with_layers(record: Record, names: Sequence[str], norms: Sequence[float] | Tensor) -> SampledRecord:
    """The record with the norms of single parameters; reads their values.

    Args:
        record: the record.
        names: the names, as for ``Layers.append``.
        norms: the norms, as for ``Layers.append``.
    """
    values: Sequence[float] = norms.tolist() if isinstance(norms, Tensor) else norms
    found = SampledRecord(*record)
    # Without a gradient the norm is negative; NaN stays NaN.
    found._by_name = {name: 0.0 if norm < 0 else norm for name, norm in zip(names, values, strict=True)}
    return found


def _clipped_norm(total_norm: float, clip_coef: float, skipped: bool) -> float:
    """The norm after clipping by a single threshold."""
    return 0.0 if skipped else total_norm * clip_coef
