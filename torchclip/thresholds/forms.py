"""The functions in which thresholds' formulas are written, for each kind of number.

A formula uses operators, comparisons and these functions, so it is written once for

- one set of gradients: floats, without any array,
- many sets in host memory: a NumPy array with an entry for each,
- many sets on a device: a tensor likewise, for whose values the host does not wait.

As on a device, every branch of a formula is computed, and ``where`` selects one.  So a branch that is not
selected must not raise an error: for example, floats must not be divided by 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchclip._core import joint_norms, scalars

_CPU = torch.device("cpu")


class Floats:
    """One number; a row of several numbers is a list, in which NaN marks empty slots."""

    hypot = staticmethod(math.hypot)
    sqrt = staticmethod(math.sqrt)

    @staticmethod
    def where(condition: bool, a: Any, b: Any) -> Any:
        """``a`` where the condition holds, ``b`` elsewhere."""
        return a if condition else b

    @staticmethod
    def any(condition: bool) -> bool:
        """Whether the condition may hold for one of the numbers."""
        return condition

    @staticmethod
    def join(norm: float, _: float) -> float:
        """The norm of given order of a vector whose parts have these norms."""
        return norm

    @staticmethod
    def put(row: list[float], slot: int, number: float, condition: bool) -> None:
        """Write a number into a slot of its row where the condition holds."""
        if condition:
            row[slot] = number

    @staticmethod
    def mean_and_deviation(row: list[float], seen: int) -> tuple[float, float]:
        """The mean and standard deviation of a row of up to ``seen`` numbers; if below two, anything."""
        if seen < 2:
            return math.inf, 0.0
        numbers = row if seen >= len(row) else row[:seen]
        count = len(numbers)
        mean = sum(numbers) / count
        if mean == math.inf:  # only the sum is
            mean = sum(number / count for number in numbers)
        # Of a list, a tuple would be made first.
        return mean, math.dist(numbers, (mean,) * count) / math.sqrt(count - 1)


class Arrays:
    """A NumPy array, of one number for each row."""

    hypot = staticmethod(np.hypot)
    sqrt = staticmethod(np.sqrt)
    where = staticmethod(np.where)
    concatenate = staticmethod(np.concatenate)

    @staticmethod
    def any(condition: Any) -> bool:
        """Whether the condition may hold for one of the numbers."""
        return bool(condition.any())

    @staticmethod
    def join(norms: Any, order: float) -> float:
        """The norm of given order of a vector whose parts have these norms, none of them ``ABSENT``."""
        return joint_norms.join_numbers(norms.tolist(), order)

    @staticmethod
    def put(rows: Any, slots: Any, numbers: Any, condition: Any) -> None:
        """Write a number into a slot of each row where the condition holds."""
        (chosen,) = condition.nonzero()
        rows[chosen, slots[chosen]] = numbers[chosen]

    @staticmethod
    def filled(count: int, number: float) -> Any:
        """The same number for each row."""
        return np.full(count, number)

    @staticmethod
    def column(values: Sequence[Any]) -> Any:
        """A number for each row, or a row of numbers for each."""
        return np.array(values)

    @staticmethod
    def mean_and_deviation(rows: Any, seen: Any) -> tuple[Any, Any]:
        """The mean and standard deviation of each row, likewise."""
        if (seen < rows.shape[1]).any():
            return _mean_and_deviation(rows, seen, np)
        mean = rows.mean(1)
        parts = rows / mean[:, None]  # as below, in fewer passes over the memory
        parts -= 1.0
        deviation = mean * np.sqrt(np.einsum("ij,ij->i", parts, parts) / (rows.shape[1] - 1))
        if np.isfinite(deviation).all():
            return mean, deviation
        return _mean_and_deviation(rows, seen, np)


class Tensors:
    """A tensor on a device, of one number for each row."""

    hypot = staticmethod(torch.hypot)
    sqrt = staticmethod(torch.sqrt)
    where = staticmethod(torch.where)
    concatenate = staticmethod(torch.cat)

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @staticmethod
    def any(_: Tensor) -> bool:
        """Whether the condition may hold for one of the numbers; always True, as to know would be to wait."""
        return True

    @staticmethod
    def join(norms: Tensor, order: float) -> Tensor:
        """The norm of given order of a vector whose parts have these norms."""
        return joint_norms.join_rows(norms, order)

    @staticmethod
    def put(rows: Tensor, slots: Tensor, numbers: Tensor, condition: Tensor) -> None:
        """Write a number into a slot of each row where the condition holds."""
        slots = slots[:, None]
        rows.scatter_(1, slots, torch.where(condition[:, None], numbers[:, None], rows.gather(1, slots)))

    def filled(self, count: int, number: float) -> Tensor:
        """The same number for each row."""
        return torch.full((count,), number, dtype=scalars.norm_dtype(self.device), device=self.device)

    def column(self, values: Sequence[Any]) -> Tensor:
        """A number for each row, or a row of numbers for each."""
        column = torch.from_numpy(np.array(values))  # in host memory, whatever the default device
        dtype = scalars.norm_dtype(self.device) if column.is_floating_point() else torch.int64
        return column.to(self.device, dtype, non_blocking=True)

    @staticmethod
    def mean_and_deviation(rows: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and standard deviation of each row, likewise."""
        return _mean_and_deviation(rows, seen, torch)


def _mean_and_deviation(rows: Any, seen: Any, module: Any) -> tuple[Any, Any]:
    is_there = rows == rows
    count = seen.clip(None, rows.shape[1])
    mean = module.where(is_there, rows / count[:, None], 0.0).sum(1)
    # Divided by the mean, which is never far below the largest norm, no square leaves the range.
    parts = module.where(is_there, rows / mean[:, None] - 1.0, 0.0)
    deviation = mean * module.sqrt((parts * parts).sum(1) / (count - 1))
    return mean, module.where(mean > 0, deviation, 0.0)


FLOATS, ARRAYS = Floats(), Arrays()
