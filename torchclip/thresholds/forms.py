"""The functions in the formulas of thresholds, for each kind of number.

A formula uses operators, comparisons and these functions, so it is written once for

- one set of gradients: floats, without any tensor,
- many sets: a tensor with an entry for each, in host memory or on a device, for which the host does not wait.

Every branch of a formula is computed, and ``where`` selects one.  So a branch that is not selected must not
raise an error: for example, floats must not be divided by 0.  The two branches must not both be plain
numbers, because ``where`` would make a float32 tensor of them.  Norms are compared with ``0.0``, not with
``0``: torch takes twice as long for an integer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchclip._core import joint_norms, memory, scalars
from torchclip._core.batch import Norms

# Some versions of torch take quantiles of at most so many numbers at a time.
_MOST = 1 << 24


class Floats:
    """One number; a row of several numbers is a list, in which NaN marks empty slots."""

    hypot = staticmethod(math.hypot)
    minimum = staticmethod(min)
    sqrt = staticmethod(math.sqrt)

    @staticmethod
    def where(condition: bool, a: Any, b: Any) -> Any:
        """``a`` where the condition holds, ``b`` elsewhere."""
        return a if condition else b

    @staticmethod
    def any(condition: bool) -> bool:
        """Whether the condition may hold for a number."""
        return condition

    @staticmethod
    def join(norm: float, _: float) -> float:
        """The norm, of a given order, of a vector whose parts have these norms."""
        return norm

    @staticmethod
    def put(row: list[float], slot: int, number: float, condition: bool) -> list[float]:
        """The row with a number in a slot where the condition holds; no list changes in place."""
        if condition:
            row = row.copy()
            row[slot] = number
        return row

    @staticmethod
    def mean_and_deviation(row: list[float], seen: int) -> tuple[float, float]:
        """The mean and standard deviation of a row of up to ``seen`` numbers; arbitrary below two."""
        if seen < 2:
            return math.inf, 0.0
        numbers = row if seen >= len(row) else row[:seen]
        count = len(numbers)
        mean = sum(numbers) / count
        if mean == math.inf:  # the sum has overflowed
            mean = sum(number / count for number in numbers)
        # math.dist() would first copy a list into a tuple.
        return mean, math.dist(numbers, (mean,) * count) / math.sqrt(count - 1)


class Tensors:
    """A tensor in host memory or on a device, of one number for each row."""

    hypot = staticmethod(torch.hypot)
    minimum = staticmethod(torch.minimum)
    where = staticmethod(torch.where)

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def norms(self, norms: Norms) -> Tensor:
        """Norms as a tensor on the device."""
        if isinstance(norms, list):
            norms = scalars.vector(norms)
        return norms.to(self.device, scalars.norm_dtype(self.device), non_blocking=True)

    @staticmethod
    def any(condition: Tensor) -> bool:
        """Whether the condition may hold for any number; always true on a device, to avoid a wait."""
        return not memory.on_host([condition]) or bool(condition.any())

    @staticmethod
    def sqrt(number: float | Tensor) -> float | Tensor:
        """The square root, also of one number for all rows."""
        return number.sqrt() if isinstance(number, Tensor) else math.sqrt(number)

    @staticmethod
    def join(norms: Tensor, order: float) -> Tensor:
        """The norm, of a given order, of a vector whose parts have these norms."""
        return joint_norms.join_rows(norms, order)

    @staticmethod
    def put(rows: Tensor, slots: Tensor, numbers: Tensor, condition: Tensor) -> Tensor:
        """The rows with a number in a slot of each where the condition holds; no tensor changes in place."""
        slots = slots.unsqueeze(1)
        numbers = torch.where(condition.unsqueeze(1), numbers.unsqueeze(1), rows.gather(1, slots))
        return rows.scatter(1, slots, numbers)

    @staticmethod
    def quantile(rows: Tensor, fraction: float) -> Tensor:
        """A quantile of the numbers in each row, without empty slots."""
        parts = torch.split(rows, max(1, _MOST // rows.shape[1]))
        found = [part.nanquantile(fraction, dim=1) for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    def filled(self, count: int, number: float) -> Tensor:
        """The same number for each row."""
        return torch.full((count,), number, dtype=scalars.norm_dtype(self.device), device=self.device)

    def column(self, values: Sequence[Any]) -> Tensor:
        """A tensor of a number, or of a row of numbers, for each row."""
        column = torch.from_numpy(np.array(values))  # in host memory, whatever the default device
        dtype = scalars.norm_dtype(self.device) if column.is_floating_point() else torch.int64
        return column.to(self.device, dtype, non_blocking=True)

    @staticmethod
    def mean_and_deviation(rows: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and standard deviation of each row of up to ``seen`` numbers; arbitrary below two."""
        count = seen.clip(None, rows.shape[1]).to(rows.dtype)
        mean = (rows / count.unsqueeze(1)).nansum(1)
        # The mean is never far below the largest norm.  So after division by it, no square overflows.
        parts = rows / mean.unsqueeze(1)
        parts -= 1.0  # in place, because new memory for each result would take longer
        parts *= parts
        deviation = mean * torch.sqrt(parts.nansum(1) / (count - 1.0))
        # The mean of the smallest numbers may round to 0.
        return mean, deviation.masked_fill(mean == 0.0, 0.0)


FLOATS = Floats()
