"""AutoClip: a percentile of the norms so far."""

from __future__ import annotations

import copy
import math
from array import array
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchclip._core import arguments
from torchclip.thresholds import checks
from torchclip.thresholds.forms import FLOATS, Arrays, Tensors
from torchclip.thresholds.learned import Learned
from torchclip.thresholds.window import in_order, in_slots


@dataclass(eq=False)
class Percentile(Learned):
    r"""Clip at a percentile of the norms so far: AutoClip.

    With the history ``H_t = {‖g_1‖, …, ‖g_t‖}``, which includes the current step's norm:

        max_norm_t = min(p-th percentile of H_t, max_norm)

    The percentile is exact, with linear interpolation as in ``numpy.percentile``.  Norms that are not finite
    do not enter the history; the threshold of such a step is the percentile of the norms before it.

    The history is kept sorted, so a step inserts one value and moves the larger ones: with a history of
    10,000 norms a step takes about 1 µs, with 100,000 norms 4 µs, with a million 40 µs.  It needs 16 bytes of
    memory per norm, up to 24 with a ``window``.

    Twin: ``torchclip.reference.percentile_thresholds``.

    Args:
        percentile: between 0 (the smallest norm so far) and 100 (the largest: no clipping). Low values clip
            most steps, as the method intends; the paper recommends 10.
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
        self._history: Any = _Sorted(self.window)

    def _learn(self, norms: Any, form: Any, order: float = 2.0) -> Any:
        where = form.where
        has_learned = self._seen >= self.warmup
        learn = (norms >= 0) & (norms < math.inf)
        history = self._history if form is FLOATS else _STORES[type(form)](self._history)
        history.add(norms, learn, self._seen)
        self._seen = seen = self._seen + learn
        count = seen if self.window is None else where(seen < self.window, seen, self.window)
        # Rounded as in NumPy.
        last = where(count > 0, count - 1, 0)
        low, high, t = history.around(last, self.percentile / 100)
        gap = high - low
        max_norms = where(t < 0.5, low + gap * t, high - gap * (1 - t))
        # Without norms it is NaN.
        return where(has_learned & (max_norms < self.max_norm), max_norms, self.max_norm)

    def copied(self) -> Percentile:
        """A copy that is only to be saved: in host memory it shares the norms."""
        copied = copy.copy(self)
        history = self._history
        if isinstance(history, np.ndarray):
            copied._history = np.array([copy.copy(each) for each in history])
        else:
            copied._history = copy.copy(history) if isinstance(history, _Sorted) else history.clone()
        return copied

    def _to_row(self, name: str, device: torch.device | None) -> Any:
        value = copy.deepcopy(getattr(self, name))
        if name == "_seen" or device is None:
            return value
        assert self.window is not None
        return in_slots(value.norms(), self._seen, self.window)

    def _from_row(self, name: str, value: Any) -> None:
        is_row = isinstance(value, list)
        setattr(self, name, _Sorted(self.window, in_order(value, self._seen)) if is_row else value)

    def _takes_rows(self, device: torch.device | None) -> bool:
        # On a device, windows are sorted in each step; all norms would be too many.
        return device is None or self.window is not None

    def _state(self) -> dict[str, Any]:
        return {"window": self.window, "seen": self._seen, "norms": self._history.norms()}

    def _load(self, state: Mapping[str, Any]) -> None:
        seen, norms = checks.window_of(state, self._kind, self.window, repr(self))
        self._seen, self._history = seen, _Sorted(self.window, norms)


class _Sorted:
    """The norms of one set, kept sorted, so that a step only inserts one value.

    A shallow copy is only for its ``norms()``, those of the moment when it was made.

    Args:
        window: how many of the latest norms count; None for all.
        norms: the norms so far, oldest first if there is a window.
    """

    def __init__(self, window: int | None, norms: Sequence[float] = ()) -> None:
        self.window = window
        self.ordered = array("d", sorted(norms))
        # As they came, for copies, too: the array is only added to, or replaced.  A copy's end at `_end`.
        self._arrived = array("d", norms)
        self._end: int | None = None

    def __copy__(self) -> _Sorted:
        copied = _Sorted(self.window)
        copied._arrived, copied._end = self._arrived, len(self._arrived)
        return copied

    def add(self, norm: float, learn: bool, _: object = None) -> None:
        if not learn:
            return
        ordered, arrived, window = self.ordered, self._arrived, self.window
        insort(ordered, norm)
        arrived.append(norm)
        if window is not None and len(arrived) > window:
            del ordered[bisect_left(ordered, arrived[-window - 1])]
            if len(arrived) > 2 * window:
                self._arrived = arrived[-window:]

    def around(self, last: int, fraction: float) -> tuple[float, float, float]:
        """The two norms that a percentile lies between, and how far it is from the lower one."""
        if not self.ordered:
            return math.inf, math.inf, 0.0
        position = last * fraction
        below = int(position)
        return self.ordered[below], self.ordered[min(below + 1, last)], position - below

    def norms(self) -> list[float]:
        """The norms that count: the last ones, oldest first; or all of them, sorted."""
        arrived = self._arrived[: self._end]
        if self.window is not None:
            return arrived[-self.window :].tolist()
        ordered: list[float] = np.sort(arrived).tolist()
        return ordered


class _SortedRows:
    """The norms of many sets in host memory, with an object for each.

    Sorting them in one array would move all norms in each step.
    """

    def __init__(self, histories: Any) -> None:
        self._histories = histories

    def add(self, norms: Any, learn: Any, _: object) -> None:
        for history, norm, learns in zip(self._histories, norms.tolist(), learn.tolist(), strict=True):
            history.add(norm, learns)

    def around(self, last: Any, fraction: float) -> tuple[Any, Any, Any]:
        position = last * fraction
        below = position.astype(np.int64)
        above = np.minimum(below + 1, last)
        ordered = [history.ordered or (math.inf,) for history in self._histories]
        low, high = (
            np.array([norms[i] for norms, i in zip(ordered, at.tolist(), strict=True)])
            for at in (below, above)
        )
        return low, high, position - below


class _Slots:
    """The windows of many sets on a device, one row each, in which NaN marks empty slots."""

    def __init__(self, slots: Tensor) -> None:
        self._slots = slots

    def add(self, norms: Tensor, learn: Tensor, seen: Tensor) -> None:
        Tensors.put(self._slots, seen % self._slots.shape[1], norms, learn)

    def around(self, last: Tensor, fraction: float) -> tuple[Tensor, Tensor, Tensor]:
        ordered = self._slots.sort(dim=1).values  # NaN last
        position = last.to(ordered.dtype) * fraction
        below = position.long()
        above = torch.minimum(below + 1, last)
        low, high = (ordered.gather(1, at[:, None]).squeeze(1) for at in (below, above))
        return low, high, position - below


# The container of norms for each form of the formula.
_STORES: dict[type, Callable[[Any], Any]] = {Arrays: _SortedRows, Tensors: _Slots}
