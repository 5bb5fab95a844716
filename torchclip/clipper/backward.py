"""The backward passes during which optimizers step, and when the last of them is over."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from itertools import islice
from weakref import ref

import torch
from torch.autograd.variable import ImperativeEngine  # type: ignore[attr-defined]

_BACKWARD = {torch.autograd.backward.__code__, torch.autograd.grad.__code__}


def is_running() -> bool:
    """Whether the caller is called from within a backward pass."""
    return torch._C._current_graph_task_id() != -1


class Passes:
    """The backward passes of a round: one, and those of checkpoints within it."""

    def __init__(self) -> None:
        # By the number of the pass, the function that torch calls at its end and keeps until then; None once
        # it was called.
        self._ends: dict[int, ref[Callable[[], object]] | None] = {}

    def follow(self, close: Callable[[], object]) -> None:
        """Call a function when the running pass, and every pass around it, is over."""
        number = torch._C._current_graph_task_id()
        if number not in self._ends:
            end = partial(self._end_of, number, close)
            self._ends[number] = ref(end)
            ImperativeEngine().queue_callback(end)

    def are_over(self) -> bool:
        """Whether the running pass is another one, because those followed have ended in an exception.

        A pass that begins later has a higher number.
        """
        number = torch._C._current_graph_task_id()
        if number in self._ends or number < max(self._ends):
            return False
        have_failed = any(end is not None and end() is None for end in self._ends.values())
        return have_failed or not _is_within_another()

    def end(self) -> None:
        """Stop following them."""
        self._ends = {}

    def _end_of(self, number: int, close: Callable[[], object]) -> None:
        if number not in self._ends:
            return
        self._ends[number] = None
        if not _is_within_another():
            close()


def _is_within_another() -> bool:
    """Whether the running pass is that of a checkpoint, within another pass."""
    passes = (frame for frame, _ in traceback.walk_stack(None) if frame.f_code in _BACKWARD)
    return len(list(islice(passes, 2))) > 1
