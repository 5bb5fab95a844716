"""What clipping did, step by step: a bounded record that costs the step next to nothing.

On an accelerator the norm of a step is a tensor whose value is not there yet when the step is recorded.
``History`` keeps such tensors as they are and fetches all values in one transfer when somebody reads.
"""

from __future__ import annotations

import csv
import importlib.util
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from torchclip._core import arguments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["History", "Record", "Summary", "as_records"]

# How many steps may wait for their values; when so many do, they are fetched without being asked for.
_MOST_PENDING = 1024

_QUANTILES = (0.1, 0.5, 0.9, 0.99)


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


def _integer(name: str, value: Any) -> int:
    return arguments.count(name, value, least=-math.inf)


# What the fields of a record must be in a saved state, in order.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "step": _integer,
    "total_norm": arguments.number,
    "max_norm": arguments.number,
    "clip_coef": arguments.number,
    "clipped": arguments.flag,
    "nonfinite": arguments.flag,
    "skipped": arguments.flag,
}


@dataclass(frozen=True)
class Summary:
    """A run in a few numbers; ``str()`` puts them in two lines.

    Counts and the largest norm are those of all steps, the quantiles those of the ``kept`` last ones.  A step
    with several records counts once: as clipped, non-finite or skipped if one of them is.
    """

    steps: int
    clipped: int
    nonfinite: int
    skipped: int
    largest_norm: float
    """The largest finite norm; ``nan`` if there was none."""
    largest_step: int | None
    """The step of the largest norm, the first one if it occurred again."""
    kept: int
    quantiles: dict[float, float]
    """Quantiles of the finite norms among the kept steps, by probability; empty if there was none."""

    @property
    def clipped_share(self) -> float:
        """Clipped steps per step; 0 for no steps."""
        return self.clipped / self.steps if self.steps else 0.0

    def __str__(self) -> str:
        counts = (
            f"{self.steps:,} steps: {self.clipped:,} clipped ({self.clipped_share:.1%}), "
            f"{self.nonfinite:,} non-finite, {self.skipped:,} skipped"
        )
        if not self.quantiles:
            return f"{counts}\nnorm: none finite among the steps kept"
        quantiles = ", ".join(f"{q:.0%} {norm:.4g}" for q, norm in self.quantiles.items())
        where = "" if self.kept == self.steps else f" (last {self.kept:,} steps)"
        return (
            f"{counts}\nnorm: {quantiles}{where}; largest {self.largest_norm:.4g} at step {self.largest_step}"
        )


class History(Sequence[Record]):
    """The last ``maxlen`` records in full, and counts over all steps.

    A sequence of ``Record``, oldest first: ``history[-1]`` is the latest, ``len(history)`` is how many are
    kept.

    Args:
        maxlen: how many records to keep, at least 1; about 300 bytes each.

    Examples:
        >>> history = History()
        >>> history.append(0, total_norm=0.5, max_norm=1.0, clip_coef=1.0)
        >>> history.append(1, total_norm=torch.tensor(4.0), max_norm=1.0, clip_coef=torch.tensor(0.25))
        >>> history[-1]
        Record(step=1, total_norm=4.0, max_norm=1.0, clip_coef=0.25, clipped=True, nonfinite=False,
               skipped=False)
        >>> print(history.summary())
        2 steps: 1 clipped (50.0%), 0 non-finite, 0 skipped
        norm: 10% 0.85, 50% 2.25, 90% 3.65, 99% 3.965; largest 4 at step 1
    """

    def __init__(self, maxlen: int = 10_000) -> None:
        self._pending: list[tuple[Any, ...]] = []
        self._kept: deque[Record] = deque(maxlen=arguments.count("maxlen", maxlen, least=1))
        self._counts = {"steps": 0, "clipped": 0, "nonfinite": 0, "skipped": 0}
        self._largest: tuple[float, int | None] = (math.nan, None)
        # Whether a record of the latest step was clipped, non-finite, skipped.
        self._latest = (False, False, False)

    def append(
        self,
        step: int,
        total_norm: float | Tensor,
        max_norm: float | Tensor,
        clip_coef: float | Tensor,
        skipped: bool | Tensor = False,
    ) -> None:
        """Record a step, without waiting for any value.

        Tensors must be 0-dim, may live on any device, and must not be modified afterwards: they are kept
        until their values are read, or until a thousand steps wait to be.

        Args:
            step: the step's number; records in a row that have the same one are counted as one step.
            total_norm: the norm of all gradients before clipping, ``inf`` and ``nan`` as they come.
            max_norm: the threshold of this step.
            clip_coef: what the gradients are multiplied by, at most 1.
            skipped: whether the step is left out.
        """
        self._pending.append((step, total_norm, max_norm, clip_coef, skipped))
        if len(self._pending) >= _MOST_PENDING:
            self._resolve()

    def _resolve(self) -> None:
        """Turn what is pending into records."""
        if not self._pending:
            return
        records = as_records(self._pending)
        self._pending.clear()
        for record in records:
            is_new = not self._kept or self._kept[-1].step != record.step
            clipped, nonfinite, skipped = (False, False, False) if is_new else self._latest
            self._latest = (
                record.clipped or clipped,
                record.nonfinite or nonfinite,
                record.skipped or skipped,
            )
            self._kept.append(record)
            self._counts["steps"] += is_new
            self._counts["clipped"] += record.clipped > clipped
            self._counts["nonfinite"] += record.nonfinite > nonfinite
            self._counts["skipped"] += record.skipped > skipped
            if not record.nonfinite and not record.total_norm <= self._largest[0]:
                self._largest = (record.total_norm, record.step)

    @property
    def _records(self) -> deque[Record]:
        self._resolve()
        return self._kept

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        return list(self._records)[index] if isinstance(index, slice) else self._records[index]

    def __repr__(self) -> str:
        return f"<History of {len(self):,} steps, at most {self._kept.maxlen:,}>"

    def summary(self) -> Summary:
        """Counts over all steps, and the quantiles of the norm over the steps kept."""
        norms = [record.total_norm for record in self if not record.nonfinite]
        quantiles = (
            dict(zip(_QUANTILES, np.quantile(norms, _QUANTILES).tolist(), strict=True)) if norms else {}
        )
        largest_norm, largest_step = self._largest
        return Summary(
            **self._counts,
            largest_norm=largest_norm,
            largest_step=largest_step,
            kept=len({record.step for record in self}),
            quantiles=quantiles,
        )

    def as_dict(self) -> dict[str, list[Any]]:
        """The records kept as columns: field of ``Record`` → its values, oldest first."""
        records = self._records
        return {name: [record[i] for record in records] for i, name in enumerate(Record._fields)}

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the records kept to a file, one line each, numbers in full precision."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(Record._fields)
            writer.writerows(self._records)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the norm over the steps on a log scale, with the threshold and the steps that were clipped.

        Needs matplotlib: ``pip install 'torchclip[demo]'``.

        Args:
            path: where to save the picture; the ending chooses the format. Not saved if left out.

        Returns:
            The figure, which a notebook shows.

        Raises:
            ModuleNotFoundError: if matplotlib is missing.
        """
        if importlib.util.find_spec("matplotlib") is None:
            raise ModuleNotFoundError(
                "plot() needs matplotlib; install it with: pip install 'torchclip[demo]'"
            )
        from torchclip.history import plots

        figure = plots.history_figure(self.as_dict())
        if path is not None:
            figure.savefig(path)
        return figure

    def state_dict(self) -> dict[str, Any]:
        """Steps and counts as plain data."""
        return {"records": self.as_dict(), "counts": dict(self._counts), "largest": list(self._largest)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything by what ``state_dict`` returned; only the last ``maxlen`` records stay.

        Raises:
            TypeError: if ``state`` or a part of it is of a wrong type.
            ValueError: if ``state`` is not a history's.
        """
        arguments.saved("state", state, ("records", "counts", "largest"), "History")
        arguments.saved("state['records']", state["records"], Record._fields, "History")
        arguments.saved("state['counts']", state["counts"], self._counts, "History")
        columns = [
            arguments.items(f"state['records']['{name}']", state["records"][name], check)
            for name, check in _CHECKS.items()
        ]
        if len(set(map(len, columns))) > 1:
            raise ValueError("`state['records']` must have columns of the same length")
        counts = {
            name: arguments.count(f"state['counts']['{name}']", state["counts"][name], least=0)
            for name in self._counts
        }
        largest = state["largest"]
        if not isinstance(largest, (list, tuple)) or len(largest) != 2:
            raise TypeError(f"`state['largest']` must be a pair, got {arguments.shown(largest)}")
        norm = arguments.number("state['largest']", largest[0])
        step = None if largest[1] is None else _integer("state['largest']", largest[1])
        self._pending.clear()
        self._kept = deque(map(Record._make, zip(*columns, strict=True)), maxlen=self._kept.maxlen)
        self._counts = counts
        self._largest = (norm, step)
        latest = [record for record in self._kept if record.step == self._kept[-1].step]
        self._latest = (
            any(record.clipped for record in latest),
            any(record.nonfinite for record in latest),
            any(record.skipped for record in latest),
        )

    def __getstate__(self) -> dict[str, Any]:
        # A pickle with tensors of an accelerator could not be read on a machine without one.
        self._resolve()
        return self.__dict__


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
    return [
        Record(step, norm, max_norm, coef, coef < 1 and not skipped, not math.isfinite(norm), bool(skipped))
        for step, norm, max_norm, coef, skipped in fetched
    ]
