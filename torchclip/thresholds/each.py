"""The tensor form of thresholds: one object with vector state in place of many with a number each.

``update`` of a threshold wants the norm as a Python float.  For that an accelerator must be waited for, and
hundreds of parameters take hundreds of calls.  An ``Each`` learns from a tensor of norms and answers with a
tensor of thresholds, by a number of tensor operations that depends neither on how many there are nor on the
step, and without reading a value.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from torchclip._core import scalars

__all__ = ["Each", "floats", "integers", "present"]

_CPU = torch.device("cpu")
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

    def append(self: SameKind, more: SameKind) -> None:
        """Add further thresholds of the same kind, with the same arguments, after those that are there."""
        for name in self.columns:
            setattr(self, name, torch.cat([getattr(self, name), getattr(more, name)]))
        self._warming_up = True


def floats(values: Sequence[Any], device: torch.device) -> Tensor:
    """Numbers, or rows of numbers, as a column of the dtype that norms have on a device."""
    return _moved(torch.tensor(values, dtype=torch.float64, device=_CPU), device, scalars.norm_dtype(device))


def integers(values: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers as a column."""
    return _moved(torch.tensor(values, dtype=torch.int64, device=_CPU), device, torch.int64)


def _moved(column: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    # Made in host memory, whatever the default device is, and sent without waiting.
    return column.to(device, dtype, non_blocking=True)


def present(norms: Tensor) -> Tensor:
    """Where there is something to learn from: a norm that is there and finite."""
    return (norms >= 0) & (norms < math.inf)
