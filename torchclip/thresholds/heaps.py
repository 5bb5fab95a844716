"""The tensor form of thresholds that go by a percentile, in host memory: heaps that the kernel keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchclip._core import native
from torchclip.thresholds.each import Each, floats, integers

__all__ = ["Heaps"]

_CPU = torch.device("cpu")


class Heaps(Each):
    """Thresholds that each keep all norms that they have learned from, or the last ``window`` of them.

    A row has its norms in two heaps: from the left those up to the percentile, from the right the others.
    A place is an index from the left, or a negative one from the right.  The norm that was learned as number
    ``i`` has slot ``i % window``.  ``csrc/heaps.h`` says how a norm is added.

    Args:
        fraction: the percentile, between 0 and 1.
        window: how many of the latest norms count; None for all.
        states: what the thresholds go on from.
    """

    columns = ("_seen", "_values", "_slots", "_places")

    def __init__(self, fraction: float, window: int | None, states: Sequence[Mapping[str, Any]]) -> None:
        self._fraction, self._window = fraction, window
        self._seen = integers([state["seen"] for state in states], _CPU)
        # At least as many norms as any row has: there must be room for one more.
        self._most = max((len(state["norms"]) for state in states), default=0)
        size = len(states), 1 << max(6, self._most.bit_length())
        self._values = torch.zeros(size, dtype=torch.float64, device=_CPU)
        # Of no use, and of no size, without a window.
        size = (len(states), 0) if window is None else size
        self._slots, self._places = (torch.zeros(size, dtype=torch.int32, device=_CPU) for _ in range(2))
        for row, state in enumerate(states):
            self._put(row, state["seen"], state["norms"])

    def _put(self, row: int, seen: int, norms: Sequence[float]) -> None:
        """Put norms, oldest first, into a row that has none; sorted as they are, both heaps are in order."""
        places = self._places_in_order(len(norms))
        ordered, number = floats(norms, _CPU).sort()
        self._values[row, places] = ordered
        if self._window is not None:
            slots = (number + (seen - len(norms))) % self._window
            self._slots[row, places] = slots.to(torch.int32)
            self._places[row, slots] = places.to(torch.int32)

    def _places_in_order(self, count: int) -> Tensor:
        """Where so many sorted norms go: the largest on the left to 0, the smallest on the right to -1."""
        left = int((count - 1) * self._fraction) if count else 0
        return left - torch.arange(count, device=_CPU)

    def _learned(self, norms: Tensor, warmup: int, max_norm: float) -> Tensor:
        """Take in a norm for each row; their percentiles, ``max_norm`` at most and in the warm-up."""
        capacity = self._values.shape[1]
        if self._most == capacity and (self._window is None or self._window > capacity):
            self._double()
        self._most = min(self._most + 1, self._values.shape[1])
        thresholds = torch.empty_like(norms)
        columns = self._seen, self._values, self._slots, self._places
        native.extension.percentiles(
            norms, thresholds, *columns, self._fraction, self._window, warmup, max_norm
        )
        return thresholds

    def _double(self) -> None:
        """Make room for as many norms again; both heaps stay at their end of the row."""
        self._values, self._slots, self._places = (
            torch.cat([column, column], dim=1) for column in (self._values, self._slots, self._places)
        )

    def append(self, more: Heaps) -> None:
        """Add further thresholds with the same arguments after those that are there."""
        while self._values.shape[1] < more._values.shape[1]:
            self._double()
        while self._values.shape[1] > more._values.shape[1]:
            more._double()
        super().append(more)
        self._most = max(self._most, more._most)

    def _rows(self) -> list[tuple[int, list[float]]]:
        """How many norms each has learned from, and those that it keeps: oldest first, or else sorted."""
        rows = []
        for row, seen in enumerate(self._seen.tolist()):
            if self._window is None:
                norms = self._values[row, self._places_in_order(seen)].sort().values
            else:
                slots = torch.arange(max(0, seen - self._window), seen, device=_CPU) % self._window
                norms = self._values[row, self._places[row, slots].long()]
            rows.append((seen, norms.tolist()))
        return rows
