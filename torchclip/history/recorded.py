"""The records of a run: kept up to a number, and read late.

On an accelerator, the norm of a step is a tensor whose value is not known yet when the step is recorded.
Such tensors are kept, and all values are fetched in one transfer when the records are read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from threading import RLock
from typing import Any, overload

from torch import Tensor

from torchclip._core import arguments
from torchclip.history.records import Record, as_records
from torchclip.history.summary import Counts

# How many steps may wait for their values; with more, the values are fetched without a read.
_MOST_PENDING = 1024


class Recorded(Sequence[Record]):
    """The last ``maxlen`` records, oldest first, and counts over all steps.

    Other threads may read while training appends; they see the records at one moment.
    """

    def __init__(self, maxlen: int) -> None:
        self._pending: list[tuple[Any, ...]] = []
        self._kept: deque[Record] = deque(maxlen=arguments.count("maxlen", maxlen, least=1))
        self._counts = Counts()
        # Held while anything but `_pending` is changed or read.  It is an RLock, as a signal handler may read
        # in the middle of a read.
        self._lock = RLock()

    def append(
        self,
        step: int,
        total_norm: float | Tensor,
        max_norm: float | Tensor,
        clip_coef: float | Tensor,
        skipped: bool | Tensor = False,
        loss: float | Tensor | None = None,
        clipped_norm: float | Tensor | None = None,
        nonfinite: bool | Tensor | None = None,
    ) -> None:
        """Record a step, without waiting for any value.

        Tensors must be 0-dim, may be on any device, and must not be modified afterwards: the history keeps
        them until their values are read, or until there are a thousand such steps.

        Args:
            step: the step's number; consecutive records with the same number count as one step.
            total_norm: the norm of all gradients before clipping; may be ``inf`` or ``nan``.
            max_norm: the threshold of this step.
            clip_coef: the number by which the gradients are multiplied, at most 1.
            skipped: whether the step is skipped.
            loss: the loss of the step; None if it is not known.
            clipped_norm: the norm of all gradients after clipping; by default ``total_norm`` times
                ``clip_coef``, which is exact if ``clip_coef`` multiplies all gradients.
            nonfinite: whether any gradient is not finite; by default whether ``total_norm`` is not.
        """
        self._extend([(step, total_norm, max_norm, clip_coef, skipped, loss, clipped_norm, nonfinite)])

    def _extend(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Record a step that has several records: the arguments of ``append`` for each."""
        # No lock is needed, as adding to a list is atomic.
        self._pending.extend(rows)
        if len(self._pending) >= _MOST_PENDING:
            with self._lock:
                self._resolve()

    def _ends_with(self, step: int) -> bool:
        """Whether a step is the latest one, without reading its values."""
        try:
            return bool(self._pending[-1][0] == step)
        except IndexError:  # another thread may read them at this moment
            return bool(self._kept) and self._kept[-1].step == step

    def _resolve(self) -> None:
        """Turn pending rows into records.  The caller holds the lock."""
        rows = self._pending[:]  # another thread may append more at the same time
        if not rows:
            return
        records = as_records(rows)
        counts = self._counts.after(records)
        # A signal handler that has read in between has already done all this.
        if self._pending and self._pending[0] is rows[0]:
            self._kept.extend(records)
            self._counts = counts
            del self._pending[: len(rows)]

    def _snapshot(self) -> list[Record]:
        """The records at this moment."""
        with self._lock:
            self._resolve()
            return list(self._kept)

    def __len__(self) -> int:
        with self._lock:
            self._resolve()
            return len(self._kept)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._snapshot())

    def __reversed__(self) -> Iterator[Record]:
        return reversed(self._snapshot())

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return self._snapshot()[index]
        with self._lock:
            self._resolve()
            try:
                return self._kept[index]
            except IndexError:
                kept = len(self._kept)
        if not kept:
            raise IndexError("the history is empty: no step has been recorded yet")
        raise IndexError(f"the history has no record {index}: it keeps {kept:,}, from 0 to {kept - 1:,}")

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            self._resolve()
            state = vars(self) | {"_kept": self._kept.copy()}
        # Copies have their own lock and pending steps.
        return state | {"_pending": [], "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = RLock()
