"""The backward passes during which optimizers step, and when the last of them is over."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from itertools import islice
from weakref import ref

import torch
from torch.autograd.variable import ImperativeEngine  # type: ignore[attr-defined]

__all__ = ["Passes", "is_running"]

_BACKWARD = {torch.autograd.backward.__code__, torch.autograd.grad.__code__}


def is_running() -> bool:
    """Whether the caller is called from within a backward pass."""
    return torch._C._current_graph_task_id() != -1


class Passes:
    """The backward passes of a round: one, and those of checkpoints within it."""

    def __init__(self) -> None:
        # What torch calls at the end of each, and keeps until then, by the number of the pass; None if that
        # was called.
        self._ends: dict[int, ref[Callable[[], object]] | None] = {}

    def follow(self, close: Callable[[], object]) -> None:
        """Have a function called when the pass that is running is over, and all around it."""
        number = torch._C._current_graph_task_id()
        if number not in self._ends:
            end = partial(self._end_of, number, close)
            self._ends[number] = ref(end)
            ImperativeEngine().queue_callback(end)

    def are_over(self) -> bool:
        """Whether the pass that is running is another one, as those followed have ended in an exception.

        The later a pass begins, the higher is its number.
        """
        number = torch._C._current_graph_task_id()
        if number in self._ends or number < max(self._ends):
            return False
        have_failed = any(end is not None and end() is None for end in self._ends.values())
        return have_failed or not _is_within_another()

    def end(self) -> None:
        """Follow none of them any more."""
        self._ends = {}

    def _end_of(self, number: int, close: Callable[[], object]) -> None:
        if number not in self._ends:
            return
        self._ends[number] = None
        if not _is_within_another():
            close()


def _is_within_another() -> bool:
    """Whether the pass that is running is one of a checkpoint, within another."""
    passes = (frame for frame, _ in traceback.walk_stack(None) if frame.f_code in _BACKWARD)
    return len(list(islice(passes, 2))) > 1
