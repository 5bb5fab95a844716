"""One step of a run, and reading the values of many steps from their devices at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchclip._core import arguments
from torchclip._core.ranks.exchange import raise_pending


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
    """Whether any gradient is ``inf`` or ``nan``.

    Then ``total_norm`` is, too, unless only parameter groups with ``max_norm=None`` have such gradients, as
    it leaves these groups out.
    """
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
        return getattr(self, "_by_name", None)


class SampledRecord(Record):
    """A record of a step in which the norms of single parameters were measured; equal to one without."""

    _by_name: Mapping[str, float]


_PLAIN = {int, float, bool, type(None)}


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


def saved_records(state: Any) -> Iterator[Record]:
    """The records of a saved state, which has a column for each field; an error names the wrong one."""
    arguments.saved("state['records']", state, Record._fields, "History")
    columns: list[Sequence[Any]] = []
    for field, (check, plain) in _CHECKS.items():
        values = state[field]
        is_plain = type(values) is list and set(map(type, values)) <= plain
        columns.append(values if is_plain else arguments.items(f"state['records']['{field}']", values, check))
    if len(set(map(len, columns))) > 1:
        raise ValueError("`state['records']` must have columns of the same length")
    return map(Record._make, zip(*columns, strict=True))


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


def as_record(row: tuple[Any, ...]) -> Record:
    """The arguments of ``History.append`` as a record."""
    return _record(row, *row) if _PLAIN.issuperset(map(type, row)) else as_records([row])[0]


def as_records(rows: Sequence[tuple[Any, ...]]) -> list[Record]:
    """The arguments of several calls of ``History.append`` as records."""
    if _PLAIN.issuperset(map(type, chain.from_iterable(rows))):  # nearly always, unless on an accelerator
        return [_record(row, *row) for row in rows]
    fetched = iter(numbers(chain.from_iterable(rows)))
    return [_record(row, *islice(fetched, len(row))) for row in rows]


def _record(
    row: tuple[Any, ...],
    step: int,
    norm: float,
    max_norm: float,
    coef: float,
    skipped: bool,
    loss: float | None,
    clipped_norm: float | None,
    nonfinite: bool | None,
) -> Record:
    """A record from the values of a row."""
    if skipped and isinstance(row[4], Tensor):  # its value was not known yet when the step was recorded
        max_norm, coef = math.inf, 1.0
    if clipped_norm is None:
        clipped_norm = norm * coef
    clipped_norm = 0.0 if skipped else float(clipped_norm)
    is_nonfinite = not math.isfinite(norm) if nonfinite is None else bool(nonfinite)
    clipped, loss = coef < 1 and not skipped, None if loss is None else float(loss)
    return Record(step, norm, max_norm, coef, clipped, is_nonfinite, bool(skipped), loss, clipped_norm)


def with_layers(record: Record, names: Sequence[str], norms: Sequence[float] | Tensor) -> SampledRecord:
    """The record with the norms of single parameters, as for ``Layers.append``; reads their values."""
    values: Sequence[float] = norms.tolist() if isinstance(norms, Tensor) else norms
    found = SampledRecord(*record)
    # Without a gradient the norm is negative; NaN stays NaN.
    found._by_name = {name: 0.0 if norm < 0 else norm for name, norm in zip(names, values, strict=True)}
    return found
