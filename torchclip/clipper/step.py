"""One step of an optimizer, seen from its hooks: nesting, closures, exceptions, what is undone afterwards."""

from __future__ import annotations

import inspect
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, Literal, TypeAlias
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchclip._core import gather, mesh
from torchclip._core.batch import Norm

__all__ = ["Member", "Outcome", "State", "Step", "creates_state", "why_not_fused", "with_closure"]

Outcome: TypeAlias = Literal["finished", "failed", "again"]
"""Why something is undone: the step is over, it ended in an exception, or its closure is called again."""

# The code of what torch puts around every optimizer's step(), which calls the hooks.
_AROUND_STEP = Optimizer.profile_hook_step(lambda self: None).__code__
_ARGS = _AROUND_STEP.co_varnames[_AROUND_STEP.co_argcount + _AROUND_STEP.co_kwonlyargcount]


class Member:
    """What is to be known of one of the optimizers that step together; the kernel has a ``Member`` as well.

    Args:
        optimizer: the optimizer, which is not kept alive.

    Attributes:
        running: whether a step has begun and not ended, or not been found to have failed.
        nested: whether another one has begun within it.
        short: whether the step that is running was begun by the kernel.
        stepped: whether a step has ended in the round that is open.
    """

    def __init__(self, optimizer: ref[Optimizer]) -> None:
        self._optimizer = optimizer
        self.running = self.nested = self.short = self.stepped = False
        self._marks: list[tuple[ref[Tensor] | None, int]] = []
        self._sample: tuple[ref[Tensor], float] | None = None

    def mark(self, sample: bool) -> None:
        """Take note of the gradients as they are, to tell later whether they are still the same.

        Args:
            sample: whether to note a value as well, in host memory: not every change counts as a version.
        """
        gradients = [p.grad for p in self._parameters()]
        self._marks = [(None, 0) if grad is None else (ref(grad), _version(grad)) for grad in gradients]
        self._sample = _sample_of(gradients) if sample else None

    def changed(self) -> list[Tensor]:
        """The gradients that are not the same as when ``mark`` was called, without those that are gone."""
        found = []
        marks = itertools.chain(self._marks, itertools.repeat((None, 0)))
        for parameter, (marked, version) in zip(self._parameters(), marks, strict=False):
            grad = parameter.grad
            if grad is not None and (marked is None or marked() is not grad or _version(grad) != version):
                found.append(grad)
        if self._sample is not None and not found:
            sampled, norm = self._sample
            grad = sampled()
            if grad is not None and _norm(grad) != norm:
                found.append(grad)
        return found

    def _parameters(self) -> list[Tensor]:
        optimizer = self._optimizer()
        return [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _norm(tensor: Tensor) -> float:
    return float(gather.tensors([tensor]).norm(2.0))


def _sample_of(gradients: Sequence[Tensor | None]) -> tuple[ref[Tensor], float] | None:
    """A small gradient in host memory whose norm is neither 0 nor infinite, and the norm."""
    on_host = [g for g in gradients if g is not None and g.is_cpu and not mesh.any_dtensor([g])]
    for grad in sorted(on_host, key=torch.numel):
        norm = _norm(grad)
        if 0 < norm < math.inf:
            return ref(grad), norm
    return None


class State:
    """What the hooks of all the optimizers know; the kernel's ``StepState`` stands in for it.

    Attributes:
        members: the optimizers.
        number: of the round that is open, or comes next.
        open: whether gradients were clipped, and not all have stepped with them.
        opener: which optimizer has opened the round.
        went_short: whether the kernel has clipped them, and has the record.
        loss: what the record of the next round gets.
        next_sample: the number of the round at whose end ``Round.after_step`` is to be called in any case.
    """

    def __init__(self, optimizers: Sequence[ref[Optimizer]]) -> None:
        self.members = tuple(Member(optimizer) for optimizer in optimizers)
        self.number = self.opener = self.next_sample = 0
        self.open = self.went_short = False
        self.loss: float | Tensor | None = None

    def record(self) -> None:
        """Record the round that the kernel has clipped; without it there is none."""

    def keep_records(self, rows: list[tuple[Any, ...]], full: Callable[[], object]) -> None:
        """Where the kernel puts its records, and what it calls when there are many."""

    def flush(self) -> None:
        """Put them there now."""


class Step:
    """The step that an optimizer is taking.

    The ``step()`` of a subclass may call its parent's, which has the same hooks: they are one step.  A step
    that ended in an exception has never reached its second hook; this is found out when the next one begins.

    It does not keep the optimizer alive.

    Args:
        optimizer: whose steps these are.
        member: what the hooks know.

    Attributes:
        counts: whether the step that is running is one of training's.
    """

    def __init__(self, optimizer: ref[Optimizer], member: Member) -> None:
        self._optimizer = optimizer
        self.member = member
        self.counts = True
        self._undo: list[Callable[[Outcome], None]] = []

    @property
    def optimizer(self) -> Optimizer:
        """Whose steps these are."""
        optimizer = self._optimizer()
        assert optimizer is not None, "the optimizer is gone"
        return optimizer

    def begin(self) -> bool:
        """Begin a step; False if it is a part of the one that has begun already."""
        if self.member.running:
            if self._is_around(sys._getframe(1), 1):
                self.member.nested = True
                return False
            self.undo("failed")
        self.member.running, self.counts = True, True
        self.member.nested = self.member.short = False
        return True

    def end(self) -> bool:
        """End a step; False if it is only a part of one."""
        member = self.member
        if not member.running or (member.nested and self._is_around(sys._getframe(1), 1)):
            return False
        member.running = False
        self.undo("finished")
        return True

    def fail(self) -> None:
        """End a step with an exception that is on its way."""
        self.member.running = False
        self.undo("failed")

    def is_running(self) -> bool:
        """Whether the caller is called from within a step; one that has failed is ended."""
        if self.member.running and not self._is_around(sys._getframe(1), 0):
            self.fail()
        return self.member.running

    def undo_at_end(self, undo: Callable[[Outcome], None]) -> None:
        """Have something undone as soon as this step is over, or its closure is called again."""
        self._undo.append(undo)

    def undo(self, outcome: Outcome) -> None:
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


def why_not_fused(optimizer: Optimizer) -> str | None:
    """Why a step does not heed a ``grad_scale`` and a ``found_inf``; None if it does, as torch's fused ones.

    The steps that torch itself wrote do so if the optimizer was made with ``fused`` and all groups have it.
    """
    if not optimizer.defaults.get("fused"):
        return "the optimizer does not divide by a grad_scale"
    if not all(group.get("fused") for group in optimizer.param_groups):
        return "a parameter group is not fused"
    # Whoever sees the gradients before the optimizer does must find them clipped.
    if not type(optimizer).step.__module__.startswith("torch.optim."):
        return "a step() of another class may look at the gradients"
    return None


def creates_state(
    optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any], total_norm: Callable[[], Norm]
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
        and bool(total_norm() <= 0.0)
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
