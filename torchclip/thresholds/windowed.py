"""The tensor form of thresholds that go by the last norms: a ring buffer for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchclip._core import scalars
from torchclip.thresholds.each import Each

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
        slots = torch.full((len(states), window), self._empty, dtype=torch.float64)
        for row, state in zip(slots, states, strict=True):
            norms = torch.tensor(state["norms"], dtype=torch.float64)
            row[torch.arange(state["seen"] - len(norms), state["seen"]) % window] = norms
        self._slots = slots.to(device, scalars.norm_dtype(device))
        self._seen = torch.tensor([state["seen"] for state in states], dtype=torch.int64, device=device)

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
