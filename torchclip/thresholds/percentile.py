"""AutoClip: a percentile of the norms so far."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchclip._core import arguments, native
from torchclip.thresholds import checks
from torchclip.thresholds.each import Each, present
from torchclip.thresholds.heaps import Heaps
from torchclip.thresholds.windowed import Windowed

__all__ = ["Percentile"]


class Percentile:
    r"""Clip at a percentile of the norms so far: AutoClip.

    With the history ``H_t = {‖g_1‖, …, ‖g_t‖}``, which includes the current step's norm:

        max_norm_t = min(p-th percentile of H_t, max_norm)

    The percentile is exact, with linear interpolation as in ``numpy.percentile``.  Norms that are not
    finite do not enter the history; such a step gets the percentile of the norms before it.

    The history is kept sorted, so a step inserts one value instead of sorting again.  What that costs is
    moving the larger values up: with a history of 10,000 norms a step takes about 1 µs, with 100,000 norms
    4 µs, with a million 40 µs.  The memory is 8 bytes a norm, 40 with a ``window``.  For many parameters with
    a threshold each, in host memory, the kernel keeps heaps in place of sorted histories: a step takes some
    0.1 µs a parameter, and the memory is at most 16 bytes a norm, 32 with a ``window``.

    Twin: ``torchclip.reference.percentile_thresholds``.

    Args:
        percentile: between 0 (the smallest norm so far) and 100 (the largest: no clipping). Low values clip
            most steps, which is the method's intent; the paper recommends 10.
        window: how many of the latest norms count; ``None`` for all, as in the paper.
        warmup: so many finite norms are only learned from at first; these steps are clipped to ``max_norm``
            alone. The paper has no warm-up.
        max_norm: a hard ceiling for the threshold, in the warm-up too.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if an argument is out of its range.

    References:
        Seetharaman, Wichern, Pardo and Le Roux, *AutoClip: Adaptive Gradient Clipping for Source Separation
        Networks*, 2020, https://arxiv.org/abs/2007.14469

    Examples:
        >>> threshold = Percentile(50.0)
        >>> [threshold.update(norm) for norm in [1.0, 3.0, 100.0, math.nan]]
        [1.0, 2.0, 3.0, 3.0]
    """

    def __init__(
        self,
        percentile: float = 10.0,
        window: int | None = None,
        warmup: int = 0,
        max_norm: float = math.inf,
    ) -> None:
        self.percentile = checks.between("percentile", percentile, 100)
        self.window = None if window is None else arguments.count("window", window, least=1)
        self.warmup = arguments.count("warmup", warmup, least=0)
        self.max_norm = arguments.threshold("max_norm", max_norm)
        self._seen = 0
        self._sorted = array("d")
        self._arrivals: deque[float] = deque()  # in order of arrival; stays empty without a window

    def update(self, norm: float) -> float:
        """Add ``norm`` to the history and return the threshold of this step."""
        norm = checks.norm(norm)
        warming_up = self._seen < self.warmup
        if math.isfinite(norm):
            self._seen += 1
            self._remember(norm)
        if warming_up or not self._sorted:
            return self.max_norm
        return min(_quantile(self._sorted, self.percentile), self.max_norm)

    def _remember(self, norm: float) -> None:
        insort(self._sorted, norm)
        if self.window is None:
            return
        self._arrivals.append(norm)
        if len(self._arrivals) > self.window:
            del self._sorted[bisect_left(self._sorted, self._arrivals.popleft())]

    def each(self, states: Sequence[Mapping[str, Any]], device: torch.device) -> Each | None:
        """The tensor form of several of these, which go on from the given states.

        On an accelerator windows are sorted, and without a window there is none.  In host memory the kernel
        adds a norm to each; where it is off there is none, as to sort so many takes longer than to insert.
        """
        if device.type == "cpu":
            return None if not native.active() else _PercentilesOnHost(self, states)
        return None if self.window is None else Percentiles(self, states, device)

    def state_dict(self) -> dict[str, Any]:
        """The history, as plain data."""
        norms = self._sorted if self.window is None else self._arrivals
        return _state(self.window, self._seen, list(norms))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``; the arguments stay those of this object.

        Raises:
            TypeError: if ``state`` or a part of it is of a wrong type.
            ValueError: if ``state`` is that of another kind of threshold or of another ``window``.
        """
        seen, norms = checks.window_of(state, "Percentile", self.window, repr(self))
        self._seen = seen
        self._sorted = array("d", sorted(norms))
        self._arrivals = deque(norms if self.window is not None else ())

    def __repr__(self) -> str:
        return (
            f"Percentile(percentile={self.percentile}, window={self.window}, warmup={self.warmup}, "
            f"max_norm={self.max_norm})"
        )


def _quantile(ordered: array[float], percentile: float) -> float:
    """The percentile of sorted values, rounded as NumPy rounds it."""
    position = (len(ordered) - 1) * (percentile / 100)
    below = int(position)
    t = position - below
    low, high = ordered[below], ordered[min(below + 1, len(ordered) - 1)]
    return low + (high - low) * t if t < 0.5 else high - (high - low) * (1 - t)


def _state(window: int | None, seen: int, norms: list[float]) -> dict[str, Any]:
    return {"kind": "Percentile", "window": window, "seen": seen, "norms": norms}


class Percentiles(Windowed):
    """``Percentile`` with a window for many norms at once, formula by formula."""

    _empty = math.inf  # sorted after all norms

    def __init__(self, rule: Percentile, states: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        assert rule.window is not None
        super().__init__(rule.window, states, device)
        self._rule = rule

    def update(self, norms: Tensor, norm_type: float) -> Tensor:
        unlimited = self._seen < self._rule.warmup
        self._put(norms, present(norms))
        unlimited = unlimited | (self._seen == 0)
        max_norms = self._quantiles().clamp(max=self._rule.max_norm)
        return torch.where(unlimited, self._rule.max_norm, max_norms)

    def _quantiles(self) -> Tensor:
        ordered = self._slots.sort(dim=1).values
        last = self._seen.clamp(min=1, max=self._window) - 1
        position = last.to(ordered.dtype) * (self._rule.percentile / 100)
        below = position.long()
        t = position - below
        low, high = (
            ordered.gather(1, at.unsqueeze(1)).squeeze(1) for at in (below, torch.minimum(below + 1, last))
        )
        return torch.where(t < 0.5, low + (high - low) * t, high - (high - low) * (1 - t))

    def states(self) -> list[dict[str, Any]]:
        return [_state(self._window, seen, norms) for seen, norms in self._rows()]


class _PercentilesOnHost(Heaps):
    """``Percentile`` for many norms in host memory, to the last digit."""

    def __init__(self, rule: Percentile, states: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(rule.percentile / 100, rule.window, states)
        self._rule = rule

    def update(self, norms: Tensor, norm_type: float) -> Tensor:
        return self._learned(norms, self._rule.warmup, self._rule.max_norm)

    def states(self) -> list[dict[str, Any]]:
        return [_state(self._rule.window, seen, norms) for seen, norms in self._rows()]
