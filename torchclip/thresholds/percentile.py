"""AutoClip: a percentile of the norms so far."""

from __future__ import annotations

import copy
import math
from array import array
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchclip._core import arguments
from torchclip.thresholds import checks
from torchclip.thresholds.forms import FLOATS
from torchclip.thresholds.learned import Learned
from torchclip.thresholds.window import in_order, in_slots


@dataclass(eq=False)
class Percentile(Learned):
    r"""Clip at a percentile of the norms so far: AutoClip.

    With the history ``H_t = {‖g_1‖, …, ‖g_t‖}``, which includes the current step's norm:

        max_norm_t = min(p-th percentile of H_t, max_norm)

    The percentile is exact, with linear interpolation as in ``numpy.percentile``.  A norm that is not finite
    does not enter the history, and the threshold of its step is the percentile of the norms before it.

    The history is kept sorted, so a step inserts one value and moves the larger ones.  A step takes about
    1 µs with 10,000 norms, 4 µs with 100,000, and 40 µs with a million.  The history needs 16 bytes of memory
    for each norm, or up to 24 with a ``window``.

    Twin: ``torchclip.reference.percentile_thresholds``.

    Args:
        percentile: between 0 (the smallest norm so far) and 100 (the largest: no clipping). Low values clip
            most steps, as the method intends. The paper recommends 10.
        window: the number of latest norms that count; ``None`` for all, as in the paper.
        warmup: the number of finite norms in the warm-up, in which steps are clipped to ``max_norm`` alone.
            The paper has no warm-up.
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

    _kind = "Percentile"
    _columns = ("_seen", "_history")

    percentile: float = 10.0
    window: int | None = None
    warmup: int = 0
    max_norm: float = math.inf

    def __post_init__(self) -> None:
        self.percentile = checks.between("percentile", self.percentile, 100)
        self.window = None if self.window is None else arguments.count("window", self.window, least=1)
        self.warmup = arguments.count("warmup", self.warmup, least=0)
        self.max_norm = arguments.threshold("max_norm", self.max_norm)
        self._seen = 0
        self._history: Any = _Sorted(self.window, [], 0)

    def _learn(self, norms: Any, form: Any, order: float = 2.0) -> Any:
        seen, history = self._seen, self._history
        learn = (norms >= 0.0) & (norms < math.inf)
        if form is FLOATS:
            if learn:
                self._history = history = history.with_norm(norms)
            max_norms = history.percentile(self.percentile)
        else:
            self._history = form.put(history, seen % history.shape[1], norms, learn)
            max_norms = form.quantile(self._history, self.percentile / 100)
        self._seen = seen + learn
        # Without norms it is NaN.
        return form.where((seen >= self.warmup) & (max_norms < self.max_norm), max_norms, self.max_norm)

    def _to_row(self, name: str) -> Any:
        if name == "_seen":
            return self._seen
        assert self.window is not None
        return in_slots(self._history.norms(self._seen), self._seen, self.window)

    def _from_row(self, name: str, value: Any) -> None:
        if name == "_history":
            value = _Sorted(self.window, in_order(value, self._seen), self._seen)
        setattr(self, name, value)

    def _takes_rows(self, on_device: bool) -> bool:
        # Tensors are sorted in each step.  In host memory, a call for each set is faster.  Without a window
        # there would be too many norms to sort.
        return on_device and self.window is not None

    def _state(self) -> dict[str, Any]:
        return {"window": self.window, "seen": self._seen, "norms": self._history.norms(self._seen)}

    def _load(self, state: Mapping[str, Any]) -> None:
        seen, norms = checks.window_of(state, self._kind, self.window, repr(self))
        self._seen, self._history = seen, _Sorted(self.window, norms, seen)


class _Sorted:
    """The norms of one set, kept sorted, so that a step only inserts one value.

    After it has learned more, it still knows the ``norms`` from before.

    Args:
        window: how many of the latest norms count; None for all.
        norms: the norms so far, oldest first if there is a window.
        seen: how many there were, including older ones.
    """

    def __init__(self, window: int | None, norms: Sequence[float], seen: int) -> None:
        self._window = window
        self._ordered = array("d", sorted(norms))
        # In the order of the steps, from number `_first` on; the array is only appended to.
        self._arrived, self._first = array("d", norms), seen - len(norms)

    def with_norm(self, norm: float) -> _Sorted:
        """Learn from a finite norm; returns what to go on with."""
        ordered, arrived, window = self._ordered, self._arrived, self._window
        insort(ordered, norm)
        arrived.append(norm)
        if window is not None and len(arrived) > window:
            del ordered[bisect_left(ordered, arrived[-window - 1])]
            if len(arrived) > 2 * window:
                latest = copy.copy(self)
                latest._arrived, latest._first = arrived[-window:], self._first + len(arrived) - window
                return latest
        return self

    def percentile(self, percentile: float) -> float:
        """A percentile of the norms, rounded as in NumPy; NaN without norms."""
        ordered = self._ordered
        last = len(ordered) - 1
        if last < 0:
            return math.nan
        position = last * (percentile / 100)
        below = int(position)
        low, t = ordered[below], position - below
        if t == 0:
            return low
        high = ordered[below + 1]
        return low + (high - low) * t if t < 0.5 else high - (high - low) * (1 - t)

    def norms(self, seen: int) -> list[float]:
        """The norms that count among the first ``seen``: the last ones, oldest first; or all, sorted."""
        arrived = self._arrived[: seen - self._first]
        if self._window is not None:
            return arrived[-self._window :].tolist()
        ordered: list[float] = np.sort(arrived).tolist()
        return ordered
