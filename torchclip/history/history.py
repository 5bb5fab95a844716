"""What clipping did, step by step, in numbers, words and pictures.

On an accelerator, the norm of a step is a tensor whose value is not known yet when the step is recorded.
Such tensors are kept, and all values are fetched in one transfer when the records are read.
"""

from __future__ import annotations

import copy
import csv
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from threading import RLock
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor

from torchclip._core import arguments
from torchclip._core.extras import check_installed
from torchclip.history.advice import Advice, advise
from torchclip.history.layers import Layers
from torchclip.history.records import Record, as_records, saved_records
from torchclip.history.stalls import ClippedSizes
from torchclip.history.summary import Counts, Summary, summary_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# How many steps may wait for their values; with more, the values are fetched without a read.
_MOST_PENDING = 1024


class History(Sequence[Record]):
    """The last ``maxlen`` records in full, and counts over all steps.

    A sequence of ``Record``, oldest first: ``history[-1]`` is the latest, ``len(history)`` is the number of
    kept records.  Other threads may read while training appends; they see the history at one moment.

    Args:
        maxlen: the number of records to keep, at least 1; a record takes about 300 bytes.

    Examples:
        >>> import torch
        >>> history = History()
        >>> history.append(0, total_norm=0.5, max_norm=1.0, clip_coef=1.0)
        >>> history.append(1, total_norm=torch.tensor(4.0), max_norm=1.0, clip_coef=torch.tensor(0.25))
        >>> history[-1]
        Record(step=1, total_norm=4.0, max_norm=1.0, clip_coef=0.25, clipped=True, nonfinite=False,
               skipped=False, loss=None, clipped_norm=1.0)
        >>> print(history.summary())
        2 steps: 1 clipped (50.0%), 0 non-finite, 0 skipped
        norm: 10% 0.85, 50% 2.25, 90% 3.65, 99% 3.965; largest 4 at step 1
        after clipping: 10% 0.55, 50% 0.75, 90% 0.95, 99% 0.995
    """

    layers: Layers
    """The norms of single parameters, from every ``layers_every``-th step of a ``Clipper``."""

    def __init__(self, maxlen: int = 10_000) -> None:
        self._pending: list[tuple[Any, ...]] = []
        self._kept: deque[Record] = deque(maxlen=arguments.count("maxlen", maxlen, least=1))
        self._counts = Counts()
        # Held while anything but `_pending` is changed or read.  It is an RLock, as a signal handler may read
        # in the middle of a read.
        self._lock = RLock()
        self.layers = Layers()
        # What a Clipper measures for the advice: the size of clipped gradients beside the optimizer's `eps`.
        self._clipped_sizes = ClippedSizes()
        self._is_followed = False  # by a Clipper, which records its steps here

    def __repr__(self) -> str:
        return f"<History of {len(self):,} steps, at most {self._kept.maxlen:,}>"

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

    def summary(self) -> Summary:
        """Counts over all steps, and quantiles of the norm over the kept steps."""
        with self._lock:
            records = self._snapshot()
            return summary_of(self._counts, records)

    def suggest(self, max_norm: float | None = None) -> Advice:
        """Whether to keep the threshold of this run, and which one to use otherwise.

        Args:
            max_norm: the threshold to judge by the norms of this run; by default the one that it had.

        Returns:
            The verdict on the threshold, what fixed thresholds would have done, and what is unusual about the
            norms; ``str()`` says it in words.

        Examples:
            >>> history = History()
            >>> for step in range(100):
            ...     history.append(step, 1.0 + step % 7, float("inf"), 1.0)
            >>> advice = history.suggest()
            >>> advice.max_norm, advice.spikes, advice.drifts
            (7.0, 0, False)
        """
        if max_norm is not None:
            max_norm = arguments.threshold("max_norm", max_norm)
        with self._lock:
            records, steps = self._snapshot(), self._counts.steps
        earlier = steps - len({record.step for record in records})
        return advise(records, earlier, self._clipped_sizes, max_norm, self.layers)

    def as_dict(self) -> dict[str, list[Any]]:
        """The kept records as columns: field of ``Record`` → its values, oldest first."""
        records = self._snapshot()
        return {name: [record[i] for record in records] for i, name in enumerate(Record._fields)}

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the kept records to a file, one per line, with numbers in full precision."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(Record._fields)
            writer.writerows(self._snapshot())

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the norm over the steps on a log scale, with the threshold and the steps that were clipped.

        Needs matplotlib: ``pip install 'torchclip[demo]'``.

        Args:
            path: where to save the picture; the ending chooses the format. By default it is not saved.

        Returns:
            The figure, which a notebook shows.

        Raises:
            ModuleNotFoundError: if matplotlib is missing.
        """
        check_installed("plot()", "matplotlib")
        from torchclip.history.figure import history_figure

        return _saved(history_figure({"Norm over steps": self.as_dict()}), path)

    def plot_layers(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the norm of each parameter over the steps as a heat map, which shows which layer explodes or
        vanishes.  With ``updates=True``, a second heat map below it shows how far the steps move each.

        Needs matplotlib, ``pip install 'torchclip[demo]'``, and a clipper with ``layers_every``.

        Args:
            path: where to save the picture; the ending chooses the format. By default it is not saved.

        Returns:
            The figure, which a notebook shows.

        Raises:
            ModuleNotFoundError: if matplotlib is missing.
        """
        check_installed("plot_layers()", "matplotlib")
        from torchclip.history.heat_map import heat_maps

        return _saved(heat_maps(*self.layers._pictured()), path)

    def to_html(self, path: str | os.PathLike[str], title: str | None = None) -> None:
        """Write a page for a browser: summary, advice, the norm over the steps, its histogram, the layers.

        The page is one file, and loads nothing from the network.  Needs jinja2 and matplotlib: ``pip install
        'torchclip[demo]'``.

        Args:
            path: the file for the page.
            title: the heading, by default "Gradient norms".

        Raises:
            ModuleNotFoundError: if jinja2 or matplotlib is missing.
        """
        check_installed("to_html()", "jinja2", "matplotlib")
        from torchclip.history.page import page

        html = page("Gradient norms" if title is None else title, {"": self})
        with open(path, "w", encoding="utf-8") as file:
            file.write(html)

    def state_dict(self) -> dict[str, Any]:
        """Steps and counts as plain data."""
        with self._lock:
            return {
                "records": self.as_dict(),
                "counts": self._counts.state_dict(),
                "layers": self.layers.state_dict(),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the contents by those of a ``state_dict``; only the last ``maxlen`` records are kept.

        Raises:
            TypeError: if ``state`` or a part of it is of a wrong type.
            ValueError: if ``state`` is not a history's.
        """
        arguments.saved("state", state, ("records", "counts", "layers"), "History")
        kept = deque(saved_records(state["records"]), maxlen=self._kept.maxlen)
        counts = Counts.loaded(state["counts"], kept)
        layers = Layers()
        layers.load_state_dict(state["layers"])
        with self._lock:
            self._pending.clear()
            self.layers = layers
            self._kept, self._counts = kept, counts

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            self._resolve()
            state = vars(self) | {"_kept": self._kept.copy(), "layers": copy.copy(self.layers)}
        # Copies have their own lock and pending steps, and no Clipper.
        return state | {"_pending": [], "_lock": None, "_is_followed": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = RLock()


def _saved(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    if path is not None:
        figure.savefig(path)
    return figure
