"""One step of an optimizer, from its hooks' point of view: whether it runs, and what is undone at its end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from threading import RLock, get_ident
from types import FrameType
from typing import Any, Literal, TypeAlias, cast
from weakref import ref

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

Outcome: TypeAlias = Literal["finished", "failed", "again"]
"""Why changes are undone: the step is over, it ended in an exception, or its closure is called again."""

# The code of torch's wrapper around every optimizer's step(), which calls the hooks.
_AROUND_STEP = Optimizer.profile_hook_step(lambda self: None).__code__
_ARGS = _AROUND_STEP.co_varnames[_AROUND_STEP.co_argcount + _AROUND_STEP.co_kwonlyargcount]


class Step:
    """The step that an optimizer is taking.

    The ``step()`` of a subclass may call its parent's, which has the same hooks; together they are one step.
    A step that ends in an exception never reaches its second hook.  So a step remembers its thread, and
    whoever asks whether it runs looks for it on that thread's stack.

    What is changed for the time of one step is registered before it is changed.  So an interrupt at any line
    leaves nothing behind: it is undone when the step ends, or when somebody asks and finds it failed.

    It does not keep the optimizer alive.

    Args:
        index: the optimizer's place among those of its Clipper.
        optimizer: the optimizer.
        lock: held while a step ends, so that other threads see it before or after.

    Attributes:
        reference: a weak reference to the optimizer.
        kind: the name of the optimizer's class.
        name: what to call the optimizer in an error about one of several.
        hooks: the handles of the hooks before and after it; none once the Clipper is detached.
        thread: the thread of the running step; None if there is none.
        is_nested: whether another step has begun within it.
        undos: what is called when it is over.
        counts: whether the running step is a training step.
        stepped: whether a step has ended in the open round.
        fingerprint: that of the gradients when they were clipped, or when this step ended.
        override: what replaces the optimizer's ``grad_scale`` during the step; None if nothing does.
    """

    def __init__(self, index: int, optimizer: Optimizer, lock: RLock) -> None:
        self.reference, self.kind, self._lock = ref(optimizer), type(optimizer).__name__, lock
        self.name = f"optimizer {index} ({self.kind})"
        self.hooks: list[RemovableHandle] = []
        self.thread: int | None = None
        self.is_nested = False
        self.undos: list[Callable[[Outcome], None]] = []
        self.counts, self.stepped, self.fingerprint = True, False, b""
        self.override: Any = None

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer, or an error if it no longer exists."""
        optimizer = self.reference()
        if optimizer is None:
            raise RuntimeError(
                f"an optimizer ({self.kind}) of this Clipper no longer exists; keep a reference to it, as a "
                "Clipper does not, or detach() the Clipper, and make one for the optimizers that are left"
            )
        return optimizer

    def begins_anew(self) -> bool:
        """Whether a step begins, though another one has begun before: not if it is part of that."""
        with self._lock:
            if self.is_around(int(self.thread == get_ident())):
                self.is_nested = True
                return False
            self.undo("failed")
            return True

    def fail(self) -> None:
        """End the step because of an exception."""
        with self._lock:
            self.undo("failed")
            self.thread = None

    def is_running(self) -> bool:
        """Whether the step runs, in any thread; undoes what a failed step has left."""
        if self.thread is None:
            return False
        with self._lock:
            if not self.is_around(0):
                self.fail()
            return self.thread is not None

    def undo_at_end(self, undo: Callable[[Outcome], None]) -> None:
        """Register a function to call when this step is over, or when its closure is called again.

        An interrupt may have it called a second time.
        """
        self.undos.append(undo)

    def undo(self, outcome: Outcome) -> None:
        """Call the functions that were registered for this step."""
        while self.undos:
            self.undos[-1](outcome)
            self.undos.pop()

    def is_around(self, inner: int) -> bool:
        """Whether more than a given number of ``step()`` calls of the optimizer are on the step's stack."""
        optimizer = self.reference()
        # No name for the frame here: if it is this one, it would refer to itself, and stay with all in it.
        around = stepping(sys._current_frames().get(cast("int", self.thread)))
        return sum(other is optimizer for other in around) > inner


def stepping(frame: FrameType | None) -> Iterator[Optimizer]:
    """The optimizers whose ``step()`` is on a stack, innermost first."""
    while frame is not None:
        if frame.f_code is _AROUND_STEP:
            yield frame.f_locals[_ARGS][0]
        frame = frame.f_back


def is_fused(optimizer: Optimizer) -> bool:
    """Whether a step uses ``grad_scale`` and ``found_inf``, as torch's fused steps do.

    Torch's own steps use them if the optimizer was made with ``fused`` and all groups have it.
    """
    return (
        bool(optimizer.defaults.get("fused"))
        and all(group.get("fused") for group in optimizer.param_groups)
        # Code of other classes that reads the gradients before the optimizer does must find them clipped.
        and type(optimizer).step.__module__.startswith("torch.optim.")
    )
