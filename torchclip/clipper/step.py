"""One step of an optimizer, seen from its hooks: nesting, closures, exceptions, what is undone afterwards."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal, TypeAlias
from weakref import ref

from torch import nn
from torch.optim import Optimizer

from torchclip._core.batch import Norm
from torchclip.history.history import History

__all__ = ["Outcome", "State", "Step", "with_closure"]

Outcome: TypeAlias = Literal["finished", "failed", "again"]
"""Why something is undone: the step is over, it ended in an exception, or its closure is called again."""

# The code of what torch puts around every optimizer's step(), which calls the hooks.
_AROUND_STEP = Optimizer.profile_hook_step(lambda self: None).__code__
_ARGS = _AROUND_STEP.co_varnames[_AROUND_STEP.co_argcount + _AROUND_STEP.co_kwonlyargcount]


@dataclass
class State:
    """What is to be known between the two hooks of a step; the kernel's ``StepState`` stands in for it.

    Attributes:
        history: where steps are recorded.
        number: of the step that is running, or comes next.
        until: the first step that ``torchclip run`` looks at, if these are its hooks.
        running: whether a step has begun and not ended, or not been found to have failed.
        nested: whether another one has begun within it.
        went_short: whether the step that is running went the kernel's short way, and it has the record.
    """

    history: History
    number: int = 0
    until: int = 0
    running: bool = False
    nested: bool = False
    went_short: bool = False

    def record(self) -> None:
        """Record the step that went the short way; without the kernel none does."""

    def flush(self) -> None:
        """Hand the records of such steps to the history."""


class Step:
    """The step that an optimizer is taking.

    The ``step()`` of a subclass may call its parent's, which has the same hooks: they are one step.  A step
    that ended in an exception has never reached its second hook; this is found out when the next one begins.

    It does not keep the optimizer alive.

    Args:
        optimizer: whose steps these are.
        state: what the hooks know.
    """

    def __init__(self, optimizer: Optimizer, state: State) -> None:
        self._optimizer = ref(optimizer)
        self._state = state
        self._undo: list[Callable[[Outcome], None]] = []

    @property
    def optimizer(self) -> Optimizer:
        """Whose steps these are."""
        optimizer = self._optimizer()
        assert optimizer is not None, "the optimizer is gone"
        return optimizer

    def begin(self) -> bool:
        """Begin a step; False if it is a part of the one that has begun already."""
        if self._state.running:
            if self._is_around(sys._getframe(2), 1):
                self._state.nested = True
                return False
            self.take_back("failed")
        self._state.running, self._state.nested = True, False
        return True

    def end(self) -> bool:
        """End a step; False if it is only a part of one."""
        if not self._state.running or (self._state.nested and self._is_around(sys._getframe(2), 1)):
            return False
        self._state.running = False
        self.take_back("finished")
        return True

    def fail(self) -> None:
        """End a step with an exception that is on its way."""
        self._state.running = False
        self.take_back("failed")

    def is_running(self) -> bool:
        """Whether the caller is called from within a step; one that has failed is ended."""
        if self._state.running and not self._is_around(sys._getframe(1), 0):
            self.fail()
        return self._state.running

    def later(self, undo: Callable[[Outcome], None]) -> None:
        """Have something undone as soon as this step is over, or its closure is called again."""
        self._undo.append(undo)

    def take_back(self, outcome: Outcome) -> None:
        """Undo what was arranged for this step."""
        while self._undo:
            self._undo.pop()(outcome)

    def _is_around(self, frame: FrameType | None, inner: int) -> bool:
        """Whether more than so many ``step()`` of the optimizer are on the stack."""
        optimizer = self._optimizer()
        while frame is not None:
            if frame.f_code is _AROUND_STEP and frame.f_locals[_ARGS][0] is optimizer:
                if inner == 0:
                    return True
                inner -= 1
            frame = frame.f_back
        return False


def creates_state(
    optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any], total_norm: Norm
) -> bool:
    """Whether a step is none of training's, but has the optimizer create its state.

    So do ``torch.distributed.checkpoint.state_dict`` and others with an optimizer that has no state yet: all
    gradients are 0, and so is the learning rate, where there is one.  Such a step can move nothing.  What is
    cheap is asked first, and nearly always enough: to look at the norm may be to wait for it.
    """
    says_no_closure = "closure" in kwargs or len(args) > 1
    return (
        says_no_closure
        and not any(optimizer.state.values())
        and all(float(group.get("lr", 0.0)) == 0.0 for group in optimizer.param_groups)
        and bool(total_norm <= 0.0)
    )


def with_closure(
    step: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    around: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of an optimizer's step with something put around the closure; None if there is none.

    Args:
        step: the function, whose signature says which argument is the closure.
        args: its arguments, the optimizer first.
        kwargs: its keyword arguments.
        around: makes the new closure out of the one that was passed.
    """
    where = _closure_argument(step, args, kwargs)
    if isinstance(where, str):
        return args, {**kwargs, where: around(kwargs[where])}
    if where is not None:
        return (*args[:where], around(args[where]), *args[where + 1 :]), kwargs
    return None


def _closure_argument(
    step: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> int | str | None:
    """Where among the arguments the closure is: its place, its name, or None if there is none.

    The signature says it by a name such as ``closure``.  In a signature without such a name it can only be
    the first argument, if that can be called with nothing; a Module, which is callable too, is none.
    """
    names = [*inspect.signature(step).parameters]
    name = next((name for name in names if name.endswith("closure")), "closure")
    if callable(kwargs.get(name)):
        return name
    if name in names:
        place = names.index(name)
        return place if len(args) > place and callable(args[place]) else None
    return 1 if len(args) > 1 and _is_closure(args[1]) else None


def _is_closure(value: object) -> bool:
    if isinstance(value, nn.Module) or not callable(value):
        return False
    try:
        inspect.signature(value).bind()
    except (TypeError, ValueError):
        return False
    return True
