"""The tensor form of thresholds that go by the last norms: a ring buffer for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchclip.thresholds.each import Each, floats, integers

__all__ = ["Windowed"]


class Windowed(Each):
    """Thresholds that each keep the last ``window`` of the norms that they have learned from.

    The norm that was learned as number ``i`` is in slot ``i % window``, also after a state was loaded.  So
    sums are formed in the same order, and a resumed run goes on with the same digits.
    """

    columns = ("_slots", "_seen")
    _empty: ClassVar[float]
    """What is in a slot that has no norm yet."""

    def __init__(self, window: int, states: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        self._window = window
        rows = [self._slots_of(state["seen"], state["norms"]) for state in states]
        self._slots = floats(rows, device).reshape(len(rows), window)
        self._seen = integers([state["seen"] for state in states], device)

    def _slots_of(self, seen: int, norms: Sequence[float]) -> list[float]:
        slots = [self._empty] * self._window
        for number, norm in enumerate(norms, start=seen - len(norms)):
            slots[number % self._window] = norm
        return slots

    def _put(self, norms: Tensor, learn: Tensor) -> None:
        """Put norms in the place of the oldest, where they are to be learned from."""
        slot = (self._seen % self._window).unsqueeze(1)
        self._slots.scatter_(
            1, slot, torch.where(learn.unsqueeze(1), norms.unsqueeze(1), self._slots.gather(1, slot))
        )
        self._seen += learn

    def _rows(self) -> list[tuple[int, list[float]]]:
        """How many norms each has learned from, and the last of them, oldest first."""
        rows = []
        for seen, slots in zip(self._seen.tolist(), self._slots.tolist(), strict=True):
            first = seen % self._window
            rows.append((seen, slots[:seen] if seen < self._window else slots[first:] + slots[:first]))
        return rows
