"""The tensor form of thresholds: one object with vector state in place of many with a number each.

``update`` of a threshold wants the norm as a Python float.  For that an accelerator must be waited for, and
hundreds of parameters take hundreds of calls.  An ``Each`` learns from a tensor of norms and answers with a
tensor of thresholds, by a number of tensor operations that depends neither on how many there are nor on the
step, and without reading a value.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from torchclip._core import scalars

__all__ = ["Each", "column", "padded", "present"]

SameKind = TypeVar("SameKind", bound="Each")


class Each(ABC):
    """Several thresholds of one kind, each with its own sequence of norms.

    Every column of the state is a tensor whose first dimension is the number of thresholds.
    """

    columns: ClassVar[tuple[str, ...]]
    """The attributes that hold the state."""
    _warming_up = True
    """False in host memory, where nothing waits to find out, once the warm-up is over everywhere."""

    @abstractmethod
    def update(self, norms: Tensor, norm_type: float) -> Tensor:
        """Take in this step's norms and return this step's thresholds, without waiting for the device.

        Args:
            norms: a norm for each threshold, of one dimension; -1 where there is no gradient. That, ``inf``
                and ``nan`` leave no trace in the threshold that they are for.
            norm_type: the order of the norms, for rules that join them.

        Returns:
            The thresholds, on the device and of the dtype of the norms.  What stands where there is no
            gradient has no meaning.
        """

    @abstractmethod
    def states(self) -> list[dict[str, Any]]:
        """What ``state_dict`` of each single threshold would return.  Waits for the device."""

    @property
    def device(self) -> torch.device:
        """Where the state is."""
        first: Tensor = getattr(self, self.columns[0])
        return first.device

    def to(self, device: torch.device) -> None:
        """Move the state."""
        for name in self.columns:
            column: Tensor = getattr(self, name)
            is_float = column.is_floating_point()
            setattr(self, name, column.to(device, scalars.norm_dtype(device) if is_float else column.dtype))

    def append(self: SameKind, more: SameKind) -> None:
        """Add further thresholds of the same kind, with the same arguments, after those that are there."""
        for name in self.columns:
            setattr(self, name, torch.cat([getattr(self, name), getattr(more, name)]))
        self._warming_up = True


def column(
    states: Sequence[Mapping[str, Any]], key: str, device: torch.device, missing: float = math.nan
) -> Tensor:
    """An entry of several saved states, as a column; for None stands ``missing``."""
    values = [missing if state[key] is None else state[key] for state in states]
    return torch.tensor(values, dtype=scalars.norm_dtype(device), device=device)


def padded(rows: Sequence[Sequence[float]], width: int, device: torch.device) -> Tensor:
    """Lists of different lengths, at most ``width``, as a column of rows that end in NaN."""
    values = [[*row, *[math.nan] * (width - len(row))] for row in rows]
    return torch.tensor(values, dtype=scalars.norm_dtype(device), device=device).reshape(len(rows), width)


def present(norms: Tensor) -> Tensor:
    """Where there is something to learn from: a norm that is there and finite."""
    return (norms >= 0) & (norms < math.inf)
