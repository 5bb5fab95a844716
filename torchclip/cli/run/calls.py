"""Calls of clipping functions, kept until the optimizers whose gradients they clipped have stepped."""

from __future__ import annotations

import math
import re
import sys
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from weakref import ref

from torch import Tensor

from torchclip._core import joint_norms, scalars
from torchclip.cli.run.trial import Effect

_MOST_CALLS = 4096  # that wait for a step
_MOST_MARKS = 64  # gradients of a call that are looked at again
_MEASURE = ("clip_grad_norm_", "clip_grads_with_norm_")  # with an infinite threshold
_LIBRARIES = re.compile(r".*[/\\](?:site|dist)-packages[/\\]")


class Site(NamedTuple):
    """A line of the program, or of a library that it uses."""

    package: str
    file: str
    line: int

    def __str__(self) -> str:
        path = Path(_LIBRARIES.sub("", self.file))
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        return f"{shown.name if shown.is_absolute() else shown.as_posix()}:{self.line}"


def site_of_caller() -> Site:
    """The line outside torch and torchclip that has called what runs now."""
    frame = sys._getframe(1)
    while True:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in ("torch", "torchclip") or frame.f_back is None:
            return Site(package, frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back


class _Mark(NamedTuple):
    """A gradient as a call has left it."""

    owner: ref[Tensor]
    key: int
    gradient: ref[Tensor]
    version: int

    def is_unchanged(self) -> bool:
        owner = self.owner()
        gradient = None if owner is None else owner.grad
        return gradient is not None and gradient is self.gradient() and _version(gradient) == self.version


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@dataclass(eq=False)
class Call:
    """One call, and what it did.

    Attributes:
        site: the line of the call.
        function: the function's name.
        parameters: the ``id`` of each tensor that it was given.
        is_used_up: whether it was given an iterator without items.
        has_gradients: whether any of the tensors had a gradient other than 0.
        backwards: the number of backward passes before it.
        unscaled: the ``id`` of each optimizer whose gradients were not multiplied by a GradScaler's scale;
            None if there was no scale.
        updates: the number of updates of GradScalers before it; one follows each step, also a skipped one.
        effect: the norm, the threshold and the coefficient.
        nonfinite: the ``id`` of each parameter whose gradient was not finite.
        is_used: whether an optimizer has stepped with what the call has left.
    """

    site: Site
    function: str
    parameters: frozenset[int]
    is_used_up: bool
    backwards: int
    unscaled: frozenset[int] | None
    updates: int
    effect: Effect
    nonfinite: Sequence[int] = ()
    has_gradients: bool = True
    is_used: bool = False

    def mark(self, items: Sequence[Tensor]) -> None:
        """Remember the gradients as they are now, some of them if there are many."""
        owners = [p for p in items if (p.is_leaf or p.retains_grad) and p.grad is not None]
        every = max(len(owners) // _MOST_MARKS, 1)
        self._marks = [
            _Mark(ref(p), id(p), ref(p.grad), _version(p.grad)) for p in owners[::every] if p.grad is not None
        ]
        self._first = ref(items[0]) if items else None
        norm = self.effect.total_norm
        self.has_gradients = bool(owners) and not (isinstance(norm, float) and norm == 0.0)

    @property
    def clips(self) -> bool:
        """Whether it could change gradients; with an infinite threshold functions for norms only measure."""
        return self.effect.max_norm < math.inf or self.function not in _MEASURE

    @property
    def is_skipped(self) -> bool:
        """Whether the norm is known not to be finite: a GradScaler skips this step."""
        norm = self.effect.total_norm
        return isinstance(norm, float) and not math.isfinite(norm)

    def exists(self) -> bool:
        """Whether its tensors still exist; if not, others may have their ``id``."""
        return self._first is None or self._first() is not None

    def is_of(self, parameters: Collection[int], backwards: int) -> bool:
        """Whether an optimizer with these parameters steps with what this call has left.

        Args:
            parameters: the ``id`` of each.
            backwards: the number of backward passes before the step.
        """
        if not self.has_gradients:
            return False
        own = [mark for mark in self._marks if mark.key in parameters]
        return self.backwards == backwards or all(mark.is_unchanged() for mark in own)


class Calls:
    """The latest calls, in their order.

    Attributes:
        number: of all calls so far.
    """

    def __init__(self) -> None:
        self.number = 0
        self._recent: deque[Call] = deque(maxlen=_MOST_CALLS)

    def add(self, call: Call) -> None:
        """Keep a call until its optimizers step."""
        self._recent.append(call)
        self.number += 1

    def since(self, number: int) -> list[Call]:
        """The calls after the first ``number`` of all."""
        wanted = min(self.number - number, len(self._recent))
        return [self._recent[-i] for i in range(wanted, 0, -1)]


def joint_effect(calls: Sequence[Call]) -> Effect:
    """What several calls did to the gradients of one step."""
    of_sets: dict[frozenset[int], Effect] = {}
    for call in calls:
        before = of_sets.get(call.parameters)
        of_sets[call.parameters] = call.effect if before is None else _in_turn(before, call.effect)
    effects = [*of_sets.values()]
    if len(effects) == 1:
        return effects[0]
    norm = joint_norms.join([each.total_norm for each in effects], 2.0)
    clip_coef = scalars.smallest(scalars.in_one([each.clip_coef for each in effects]), 1.0)
    return Effect(norm, min(each.max_norm for each in effects), clip_coef)


def _in_turn(first: Effect, second: Effect) -> Effect:
    """Of two calls on the same gradients, the second one sees what the first one has left."""
    return Effect(first.total_norm, min(first.max_norm, second.max_norm), first.clip_coef * second.clip_coef)
