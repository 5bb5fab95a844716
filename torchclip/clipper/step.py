"""One step of an optimizer, from its hooks' point of view: nesting, closures, exceptions, and undoing."""

from __future__ import annotations

import inspect
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FrameType, SimpleNamespace
from typing import Any, Literal, TypeAlias, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchclip._core import gather
from torchclip._core.batch import Norm
from torchclip._core.ranks import meshes
from torchclip.clipper.optimizers import parameters_of

Outcome: TypeAlias = Literal["finished", "failed", "again"]
"""Why changes are undone: the step is over, it ended in an exception, or its closure is called again."""

# The code of torch's wrapper around every optimizer's step(), which calls the hooks.
_AROUND_STEP = Optimizer.profile_hook_step(lambda self: None).__code__
_ARGS = _AROUND_STEP.co_varnames[_AROUND_STEP.co_argcount + _AROUND_STEP.co_kwonlyargcount]

# In place of an optimizer that is gone: it has no parameters.
_GONE = cast("Optimizer", SimpleNamespace(param_groups=[]))

_NO_SAMPLE: tuple[Callable[[], Tensor | None], float] = (lambda: None, 0.0)


class Member:
    """The state of one of the optimizers that step together; the kernel has a ``Member`` as well.

    Args:
        optimizer: the optimizer; a weak reference.

    Attributes:
        running: whether a step has begun and has neither ended nor been found to have failed.
        nested: whether another one has begun within it.
        short: whether the kernel began the running step.
        stepped: whether a step has ended in the open round.
    """

    def __init__(self, optimizer: ref[Optimizer]) -> None:
        self._optimizer = optimizer
        self.running = self.nested = self.short = self.stepped = False
        self._marks: list[tuple[ref[Tensor] | None, int]] = []
        self._sample: tuple[Callable[[], Tensor | None], float] = _NO_SAMPLE

    def mark(self, sample: bool) -> None:
        """Record the current gradients, to see later whether they are still the same.

        Args:
            sample: whether to record a value as well, in host memory, as not every change increments a
                version.
        """
        gradients = [p.grad for p in self._parameters()]
        self._marks = [(None, 0) if grad is None else (ref(grad), _version(grad)) for grad in gradients]
        self._sample = _sample_of(gradients) if sample else _NO_SAMPLE

    def changed(self) -> list[Tensor]:
        """The gradients that have changed since ``mark`` was called, without those that are gone."""
        found = []
        marks = itertools.chain(self._marks, itertools.repeat((None, 0)))
        sampled, norm = self._sample
        for parameter, (marked, version) in zip(self._parameters(), marks, strict=False):
            grad = parameter.grad
            if grad is None:
                continue
            is_same = marked is not None and marked() is grad and _version(grad) == version
            if not is_same or (sampled() is grad and _norm(grad) != norm):
                found.append(grad)
        return found

    def _parameters(self) -> list[Tensor]:
        optimizer = self._optimizer()
        return [] if optimizer is None else parameters_of(optimizer)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _norm(tensor: Tensor) -> float:
    return float(gather.tensors([tensor]).norm(2.0))


def _sample_of(gradients: Sequence[Tensor | None]) -> tuple[Callable[[], Tensor | None], float]:
    """A small gradient in host memory whose norm is neither 0 nor infinite, and the norm."""
    on_host = [g for g in gradients if g is not None and g.is_cpu and not meshes.any_dtensor([g])]
    for grad in sorted(on_host, key=torch.numel):
        norm = _norm(grad)
        if 0 < norm < math.inf:
            return ref(grad), norm
    return _NO_SAMPLE


class State:
    """The state of the hooks of all optimizers; with the kernel, its ``RoundState`` is used instead.

    Attributes:
        members: the optimizers.
        number: of the open or next round.
        open: whether gradients were clipped, and not all optimizers have stepped with them.
        opener: the optimizer that opened the round.
        went_short: whether the kernel has clipped the round, and has its record.
        loss: the loss for the record of the next round.
        next_sample: the number of the round at whose end ``Round.after_step`` must be called in any case.
    """

    def __init__(self, optimizers: Sequence[ref[Optimizer]]) -> None:
        self.members = tuple(Member(optimizer) for optimizer in optimizers)
        self.number = self.opener = self.next_sample = 0
        self.open = self.went_short = False
        self.loss: float | Tensor | None = None

    def record(self) -> None:
        """Record the round that the kernel has clipped; without the kernel there is none."""

    def keep_records(self, rows: list[tuple[Any, ...]], full: Callable[[], object]) -> None:
        """The list for the kernel's records, and a function that it calls when there are many."""

    def flush(self) -> None:
        """Put the records there now."""


class Step:
    """The step that an optimizer is taking.

    The ``step()`` of a subclass may call its parent's, which has the same hooks; together they are one step.
    A step that ends in an exception never reaches its second hook; this is found out when the next step
    begins.

    It does not keep the optimizer alive.

    Args:
        optimizer: the optimizer.
        member: the state of its hooks.

    Attributes:
        counts: whether the running step is a training step.
    """

    def __init__(self, optimizer: ref[Optimizer], member: Member) -> None:
        self._optimizer = optimizer
        self.member = member
        self.counts = True
        self._undo: list[Callable[[Outcome], None]] = []

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer; one without parameters if it is gone, which the others of its round may outlive."""
        optimizer = self._optimizer()
        return _GONE if optimizer is None else optimizer

    def is_gone(self) -> bool:
        """Whether the optimizer no longer exists."""
        return self._optimizer() is None

    def begin(self) -> bool:
        """Begin a step; False if it is part of one that has begun already."""
        if self.member.running:
            if self._is_around(sys._getframe(1), 1):
                self.member.nested = True
                return False
            self.undo("failed")
        self.member.running, self.counts = True, True
        self.member.nested = self.member.short = False
        return True

    def end(self) -> bool:
        """End a step; False if it is only part of one, or none of training's."""
        member = self.member
        if not member.running or (member.nested and self._is_around(sys._getframe(1), 1)):
            return False
        # The kernel may begin the next step.
        counts, member.running, self.counts = self.counts, False, True
        self.undo("finished")
        return counts

    def fail(self) -> None:
        """End a step because of an exception."""
        self.member.running, self.counts = False, True
        self.undo("failed")

    def is_running(self) -> bool:
        """Whether the caller is called from within a step; ends a failed step."""
        if self.member.running and not self._is_around(sys._getframe(1), 0):
            self.fail()
        return self.member.running

    def undo_at_end(self, undo: Callable[[Outcome], None]) -> None:
        """Register a function to call as soon as this step is over, or its closure is called again."""
        self._undo.append(undo)

    def undo(self, outcome: Outcome) -> None:
        """Call the functions that were registered for this step."""
        while self._undo:
            self._undo.pop()(outcome)

    def _is_around(self, frame: FrameType | None, inner: int) -> bool:
        """Whether more than a given number of ``step()`` calls of the optimizer are on the stack."""
        optimizer = self._optimizer()
        while frame is not None:
            if frame.f_code is _AROUND_STEP and frame.f_locals[_ARGS][0] is optimizer:
                if inner == 0:
                    return True
                inner -= 1
            frame = frame.f_back
        return False


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


def creates_state(
    optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any], total_norm: Callable[[], Norm]
) -> bool:
    """Whether a step is no training step, but makes the optimizer create its state.

    ``torch.distributed.checkpoint.state_dict`` and others take such a step if an optimizer has no state yet:
    they pass None as the closure, all gradients are 0, and so is the learning rate, if there is one.  Such a
    step changes nothing.  Cheap checks come first, and are nearly always enough, as reading the norm may wait
    for it.
    """
    says_no_closure = args[1] is None if len(args) > 1 else kwargs.get("closure", ...) is None
    return (
        says_no_closure
        and not any(optimizer.state.values())
        and all(float(group.get("lr", 0.0)) == 0.0 for group in optimizer.param_groups)
        and bool(total_norm() <= 0.0)
    )


def with_closure(
    step: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    around: Callable[..., Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of an optimizer's step with its closure wrapped; None if there is none.

    Args:
        step: the function, whose signature says which argument is the closure.
        args: its arguments, the optimizer first.
        kwargs: its keyword arguments.
        around: is called in its place, with it as the first argument.
    """
    where = _closure_argument(step, args, kwargs)
    if isinstance(where, str):
        return args, {**kwargs, where: partial(around, kwargs[where])}
    if where is not None:
        return (*args[:where], partial(around, args[where]), *args[where + 1 :]), kwargs
    return None


def _closure_argument(
    step: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> int | str | None:
    """The position or the name of the closure among the arguments; None if there is none.

    The signature shows it by a name such as ``closure``.  Without such a name it can only be the first
    argument, if that can be called without arguments; a Module, which is callable too, is not a closure.
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
