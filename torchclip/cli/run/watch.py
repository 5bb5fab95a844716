"""Every step of every optimizer of a program, seen through torch's global hooks."""

from __future__ import annotations

import functools
import itertools
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from statistics import median
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from torchclip._core import native
from torchclip._core.batch import Norm
from torchclip.cli.run.calls import Call, Calls
from torchclip.cli.run.gradients import nonfinite_ids, norm_of, norms_of, with_gradient
from torchclip.cli.run.trial import Trial
from torchclip.cli.run.watched import MOST_TIMES, Watched
from torchclip.clipper import clipper as clippers
from torchclip.clipper.clipper import Clipper
from torchclip.clipper.step import State

__all__ = ["Watch"]

# Parameters are measured one by one in every so many of the first steps, and of the others.
_FIRST_STEPS, _EVERY_FIRST, _EVERY = 64, 4, 32
# In such steps the time is taken; the kernel's hooks do so in the same.
_EVERY_TIMED, _TIMED = 16, 10
_MOST_NONFINITE = 100  # steps whose parameters are kept


class Watch:
    """Looks on while a program's optimizers step, and puts the clipping of a trial in place.

    An optimizer that has a Clipper is measured by that; one whose gradients were clipped by torch's functions
    has been measured by them; for the others the norm is taken before each step.

    Attributes:
        watched: the optimizers, in the order of their first steps.
        replaced_clippers: how many Clippers of the program have got the thresholds of the trial.
        calls_replaced: how often the program called a function that only measured, by its name.
    """

    def __init__(
        self, trial: Trial, calls: Calls, progress: Callable[[Watched], object] | None = None
    ) -> None:
        self.trial = trial
        self.calls = calls
        calls.on_waiting = self._see_next_step
        self.watched: list[Watched] = []
        self.replaced_clippers = 0
        self.calls_replaced: Counter[str] = Counter()
        self._own: deque[float] = deque(maxlen=MOST_TIMES)
        self._intervals: deque[float] = deque(maxlen=MOST_TIMES)
        self._looked = (0, 0.0)  # at which step Python has last looked, and when
        self._progress = progress
        self._by_id: dict[int, Watched] = {}
        self._states: dict[int, State] = {}
        self._clippers: WeakKeyDictionary[Optimizer, ref[Clipper]] = WeakKeyDictionary()
        self._ours: WeakKeyDictionary[Optimizer, Clipper] = WeakKeyDictionary()
        self._detach: list[Callable[[], None]] = []
        self._puts_one_on = False

    @property
    def steps(self) -> int:
        """How many there were, of all optimizers."""
        return sum(watched.steps for watched in self.watched)

    @property
    def seconds(self) -> float:
        """What looking on takes in a step, as a median; 0 if no step was timed."""
        return median(self._own) if self._own else 0.0

    @property
    def between(self) -> float:
        """The time from one step to the next, likewise."""
        return median(self._intervals) if self._intervals else 0.0

    def attach(self) -> None:
        """Look on from now on."""
        # What runs here is not to be compiled where the program's step is.
        own_hooks = tuple(map(torch.compiler.disable, (self._before_step, self._after_step)))
        before_step, after_step = native.watch_hooks(*own_hooks, self._states, self._own.append) or own_hooks
        if self._progress is not None:
            (after_step,) = map(torch.compiler.disable, [self._and_progress(after_step)])
        self._detach += [
            register_optimizer_step_pre_hook(before_step).remove,
            register_optimizer_step_post_hook(after_step).remove,
        ]
        initialize = Clipper.__init__

        @functools.wraps(initialize)
        def initialize_and_tell(clipper: Clipper, optimizer: Any, max_norm: Any, **options: Any) -> None:
            self._make_way(optimizer)
            if self.trial.replaces and not self._puts_one_on:
                self.replaced_clippers += 1
                max_norm = math.inf if self.trial.none else self.trial.new_max_norm()
            if self.trial.nonfinite is not None:
                options["nonfinite"] = self.trial.nonfinite
            initialize(clipper, optimizer, max_norm, **options)
            self._clippers[optimizer] = ref(clipper)
            self._see_next_step(optimizer)

        setattr(Clipper, "__init__", initialize_and_tell)  # noqa: B010
        self._detach.append(lambda: setattr(Clipper, "__init__", initialize))

    def detach(self) -> None:
        """Look on no more; Clippers of the trial stay."""
        while self._detach:
            self._detach.pop()()

    def _and_progress(self, after_step: Callable[..., object]) -> Callable[..., None]:
        def after_step_progress(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            after_step(optimizer, args, kwargs)
            watched = self._by_id.get(id(optimizer))
            if self._progress is not None and watched is not None:
                self._progress(watched)

        return after_step_progress

    # One step.  With the kernel other hooks are called, written in C, which record the usual step in one go.
    # They leave to these what has a Clipper, was clipped by a function, has a closure, or is to be looked at.

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        start = time.perf_counter()
        watched = self._by_id.get(id(optimizer))
        if watched is None or watched.groups != len(optimizer.param_groups):
            watched = self._first_seen(optimizer)
            if watched is None:
                return
        if not watched.step.begin():
            return
        watched.state.went_short, watched.norm = False, None
        if self._clipper_of(optimizer) is not None:
            self._mark(watched, optimizer)
        elif not _has_closure(args, kwargs):
            if not self.calls.are_waiting and not _is_due(watched.steps):
                watched.norm, _ = native.clip_step(optimizer, math.inf) or (None, None)
            if watched.norm is None:
                self._measure(watched, optimizer)
        if _is_due(watched.steps):
            self._take_interval(start)
        elif _is_timed(watched.steps):
            self._own.append(time.perf_counter() - start)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        start = time.perf_counter()
        watched = self._by_id.get(id(optimizer))
        if watched is None or not watched.step.end():
            return
        if watched.marker is not None:
            watched.marker.remove()
            watched.marker = None
        clipper, number = self._clipper_of(optimizer), watched.steps
        if clipper is not None:
            self._read(watched, optimizer, clipper)
        elif watched.norm is not None:
            watched.history.append(number, watched.norm, math.inf, 1.0)
        elif _has_closure(args, kwargs):
            self._measure(watched, optimizer)
        if watched.state.went_short:
            watched.state.record()
        else:
            watched.state.number += 1
        # Once there has been a Clipper, its history goes on.
        is_usual = watched.history is watched.state.history and watched.on_host
        watched.state.until = _next_due(watched.steps) if is_usual else 0
        is_timed = _is_timed(number)
        if is_timed and self._own:
            self._own[-1] += time.perf_counter() - start

    def _take_interval(self, now: float) -> None:
        steps, (earlier, before) = self.steps, self._looked
        if 0 < earlier < steps:
            self._intervals.append((now - before) / (steps - earlier))
        self._looked = (steps, now)

    def _see_next_step(self, optimizer: Any) -> None:
        """Leave an optimizer's next step to Python."""
        watched = self._by_id.get(id(optimizer))
        if watched is not None:
            watched.state.until = 0

    def _forget(self, gone: ref[Optimizer]) -> None:
        """Another object may get the ``id`` of an optimizer that is gone."""
        for key, watched in list(self._by_id.items()):
            if watched.optimizer is gone:
                del self._by_id[key], self._states[key]

    def _first_seen(self, optimizer: Optimizer) -> Watched | None:
        """Take an optimizer in, or look anew at one that has got another parameter group."""
        if not optimizer.state and _creates_state(sys._getframe(2)):
            return None
        watched = self._by_id.get(id(optimizer))
        if watched is not None:
            watched.look_at(optimizer)
        else:
            watched = Watched(optimizer, self._forget)
            self.watched.append(watched)
            self._by_id[id(optimizer)], self._states[id(optimizer)] = watched, watched.state
        if self.trial.replaces:
            for group in optimizer.param_groups:
                if group.get("max_norm") is not None:
                    del group["max_norm"]
        if self.trial.clips and self._clipper_of(optimizer) is None:
            self._put_on(watched, optimizer)
        self.calls.know(optimizer, watched.names)
        return watched

    def _put_on(self, watched: Watched, optimizer: Optimizer) -> None:
        """Give an optimizer the Clipper of the trial."""
        self._puts_one_on = True
        try:
            self._ours[optimizer] = self.trial.clipper_for(optimizer)
        except (TypeError, ValueError) as error:
            watched.problem = f"not clipped as asked: {error}"
        finally:
            self._puts_one_on = False

    def _make_way(self, optimizer: Any) -> None:
        """The program makes a Clipper of its own after this run's has been put on."""
        ours = self._ours.pop(optimizer, None) if isinstance(optimizer, Optimizer) else None
        if ours is not None:
            ours.detach()

    def _clipper_of(self, optimizer: Optimizer) -> Clipper | None:
        if not self._clippers or optimizer not in clippers._clipped_optimizers:
            return None
        found = self._clippers.get(optimizer)
        return None if found is None else found()

    def _mark(self, watched: Watched, optimizer: Optimizer) -> None:
        """In some steps, have a hook after the Clipper's take the time: not where it would be in the way.

        A fused step takes the clipping over only if the Clipper's hook is the last one.
        """
        if watched.steps % 8 == 7 and not any(group.get("fused") for group in optimizer.param_groups):

            def mark(*_: object) -> None:
                watched.seconds.append(time.perf_counter() - watched.marked)

            watched.marked = time.perf_counter()
            watched.marker = optimizer.register_step_pre_hook(mark)
        if _is_due(watched.steps):
            try:
                self._measure_layers(watched, optimizer, 1.0)
            except Exception as error:  # the program must go on, whatever its gradients are
                watched.problem = f"norms cannot be taken: {type(error).__name__}: {error}"

    def _read(self, watched: Watched, optimizer: Optimizer, clipper: Clipper) -> None:
        """Look up what a Clipper did in the step that has just been taken."""
        watched.history = clipper.history
        watched.clipped_by["a Clipper"] += 1
        if watched.on_host:
            record = clipper.history[-1] if len(clipper.history) else None
            if record is not None and record.nonfinite:
                self._note_nonfinite(watched, record.step, nonfinite_ids(_parameters(optimizer)))

    def _measure(self, watched: Watched, optimizer: Optimizer) -> None:
        """Record a step of an optimizer without a Clipper."""
        try:
            call = self.calls.of(optimizer) if self.calls.are_waiting else None
            if call is not None:
                self._record(watched, call)
                clip_coef = call.clip_coef
            else:
                self._take_norm(watched, optimizer)
                clip_coef = 1.0
            if _is_due(watched.steps) and isinstance(clip_coef, float) and clip_coef > 0:
                self._measure_layers(watched, optimizer, clip_coef)
        except Exception as error:  # the program must go on, whatever its gradients are
            watched.problem = f"norms cannot be taken: {type(error).__name__}: {error}"

    def _record(self, watched: Watched, call: Call) -> None:
        """Record a step whose gradients torch's functions have clipped."""
        watched.clipped_by[call.function] += 1
        for earlier in call.not_taken:
            norm, max_norm, clip_coef = earlier.total_norm, earlier.max_norm, earlier.clip_coef
            watched.history.append(watched.steps, norm, max_norm, clip_coef, skipped=True)
            watched.state.number += 1
        watched.history.append(watched.steps, call.total_norm, call.max_norm, call.clip_coef)
        if call.nonfinite:
            self._note_nonfinite(watched, watched.steps, call.nonfinite)

    def _take_norm(self, watched: Watched, optimizer: Optimizer) -> None:
        """Record a step whose norm nobody else takes."""
        parameters = _parameters(optimizer)
        norm = norm_of(parameters)
        norm = 0.0 if norm is None else _unscaled(norm, optimizer)
        watched.history.append(watched.steps, norm, math.inf, 1.0)
        if watched.on_host and not math.isfinite(norm):
            self._note_nonfinite(watched, watched.steps, nonfinite_ids(parameters))

    def _measure_layers(self, watched: Watched, optimizer: Optimizer, clip_coef: float) -> None:
        """Keep the norm of each parameter as it was before clipping."""
        parameters = with_gradient(_parameters(optimizer))
        if parameters:
            names = [watched.names.get(id(p), f"parameter {i}") for i, p in enumerate(parameters)]
            watched.layers.append(watched.steps, names, norms_of(parameters) / clip_coef)

    def _note_nonfinite(self, watched: Watched, step: int, parameters: Sequence[int]) -> None:
        if len(watched.nonfinite) < _MOST_NONFINITE:
            watched.nonfinite[step] = [watched.names[key] for key in parameters if key in watched.names]


def _is_due(step: int) -> bool:
    """Whether the parameters are measured one by one in a step."""
    return step % _EVERY_FIRST == 0 if step < _FIRST_STEPS else step % _EVERY == 0


def _next_due(step: int) -> int:
    """The first such step, from this one on."""
    return next(filter(_is_due, itertools.count(step)))


def _is_timed(step: int) -> bool:
    """Whether the time is taken in a step: one in which looking on does what it usually does."""
    return step % _EVERY_TIMED == _TIMED


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _unscaled(norm: Norm, optimizer: Optimizer) -> Norm:
    """A norm without a GradScaler's scale."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return norm
    return norm / scale.to(norm) if isinstance(norm, Tensor) else norm / float(scale)


def _has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return callable(kwargs["closure"] if "closure" in kwargs else args[1] if len(args) > 1 else None)


def _creates_state(frame: FrameType | None) -> bool:
    """Whether ``torch.distributed.checkpoint`` takes a step that is none, to make an optimizer's state."""
    while frame is not None:
        if frame.f_code.co_name == "_init_optim_state":
            return True
        frame = frame.f_back
    return False
