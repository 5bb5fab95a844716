"""Every step of every optimizer of a program, recorded through torch's global hooks."""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from torchclip._core.batch import Norm
from torchclip.cli.run.calls import Call, Calls
from torchclip.cli.run.gradients import nonfinite_ids, norm_of, norms_of, with_gradient
from torchclip.cli.run.losses import LossRecorder
from torchclip.cli.run.optimizer import OptimizerRecord
from torchclip.cli.run.together import OpenRound, companions
from torchclip.cli.run.trial import Trial
from torchclip.clipper import registry
from torchclip.clipper.clipper import Clipper
from torchclip.clipper.registry import clipper_of
from torchclip.clipper.step import creates_state, parameters_of, with_closure

__all__ = ["StepRecorder"]

# How often parameters are measured one by one: in the first steps, and in later ones.
_FIRST_STEPS, _EVERY_FIRST, _EVERY = 64, 4, 32
_EVERY_TIMED, _TIMED = 16, 10  # steps that are timed, in which parameters are not measured
_MOST_TIMES = 10_000
_MOST_NONFINITE = 100  # the number of steps whose non-finite parameters are kept


class StepRecorder:
    """Records each step of a program's optimizers, and applies the clipping of a trial.

    A Clipper measures its own optimizer, and torch's functions measure the gradients that they clip; for
    other optimizers the norm is measured before each step.

    Attributes:
        trial: the clipping to try.
        optimizers: the record of each, in the order of their first steps.
        replaced_clippers: how many Clippers of the program have the trial's thresholds.
    """

    def __init__(
        self,
        trial: Trial,
        calls: Calls,
        losses: LossRecorder,
        progress: Callable[[OptimizerRecord], object] | None = None,
    ) -> None:
        self.trial = trial
        self.optimizers: list[OptimizerRecord] = []
        self.replaced_clippers = 0
        self._calls = calls
        self._losses = losses
        self._progress = progress
        self._by_id: dict[int, OptimizerRecord] = {}
        self._trial_clippers: WeakKeyDictionary[Optimizer, Clipper] = WeakKeyDictionary()
        self._rounds: WeakKeyDictionary[Clipper, OpenRound] = WeakKeyDictionary()
        self._is_adding_clipper = False
        self._detach: list[Callable[[], None]] = []
        self._own_seconds: deque[float] = deque(maxlen=_MOST_TIMES)
        self._intervals: deque[float] = deque(maxlen=_MOST_TIMES)
        self._last_timed = (0, 0.0)  # the number of steps when the time was last measured, and that time

    @property
    def steps(self) -> int:
        """The number of steps of all optimizers."""
        return sum(record.steps for record in self.optimizers)

    @property
    def seconds(self) -> float:
        """The median time that recording takes in a step; 0 if no step was timed."""
        return median(self._own_seconds) if self._own_seconds else 0.0

    @property
    def between(self) -> float:
        """The median time from one step to the next."""
        return median(self._intervals) if self._intervals else 0.0

    def attach(self) -> None:
        """Record from now on."""
        # This code must not be compiled together with the program's step.
        before_step, after_step = map(torch.compiler.disable, (self._before_step, self._after_step))
        self._detach += [
            register_optimizer_step_pre_hook(before_step).remove,
            register_optimizer_step_post_hook(after_step).remove,
        ]
        self._detach.append(registry.set_adjustment(self._adjusted))

    def detach(self) -> None:
        """Stop recording; Clippers of the trial stay."""
        while self._detach:
            self._detach.pop()()

    def _adjusted(self, optimizer: Any, max_norm: Any, nonfinite: Any) -> tuple[Any, Any]:
        """The ``max_norm`` and ``nonfinite`` of a Clipper that the program makes."""
        if not self._is_adding_clipper:
            self._remove_trial_clippers(optimizer if isinstance(optimizer, (list, tuple)) else [optimizer])
            if self.trial.replaces:
                self.replaced_clippers += 1
                max_norm = math.inf if self.trial.none else self.trial.new_max_norm()
        return max_norm, self.trial.nonfinite or nonfinite

    # One step

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        start = time.perf_counter()
        record = self._by_id.get(id(optimizer))
        if record is None or record.groups != len(optimizer.param_groups):
            record = self._register(optimizer, args, kwargs)
        if record is None or not record.step.begin():
            return None
        if self._rounds:
            self._split_round(optimizer)
        record.rounds.append((record.steps, self._losses.backwards))
        record.loss, record.call, record.is_measured = self._losses.take(), None, False
        if len(args) > 1 or kwargs:

            def measured_after(closure: Callable[..., Any]) -> Callable[..., Any]:
                return functools.partial(self._call_closure, closure, record, optimizer)

            replaced = with_closure(type(optimizer).step, args, kwargs, measured_after)
            if replaced is not None:
                return replaced
        self._measure(record, optimizer)
        if _is_timed(record.steps):
            self._own_seconds.append(time.perf_counter() - start)
        return None

    def _call_closure(
        self,
        closure: Callable[..., Any],
        record: OptimizerRecord,
        optimizer: Optimizer,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Record the first call of a step's closure, with its loss and gradients."""
        result = closure(*args, **kwargs)
        if not record.is_measured:
            loss = self._losses.take()
            record.loss = loss if record.loss is None else record.loss
            self._losses.close()
            self._measure(record, optimizer)
        return result

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        start = time.perf_counter()
        record = self._by_id.get(id(optimizer))
        if record is None or not record.step.end():
            return
        if len(args) > 1 or kwargs:  # later calls of the closure do not count
            self._losses.take()
            self._calls.of(optimizer)
        clipper = clipper_of(optimizer)
        if clipper is not None:
            self._read_clipper(record, optimizer, clipper)
            if clipper in self._rounds:
                self._rounds[clipper].mark(optimizer)
        number = record.steps
        # A Clipper does this for its own history.
        if number >= record.history.clipped_sizes.next_step and record.problem is None:
            try:
                record.history.clipped_sizes.measure(number, [optimizer])
            except Exception as error:  # as in _measure
                record.problem = _no_norms(error)
        record.steps += 1
        if self._progress is not None:
            self._progress(record)
        if _is_timed(number):
            now = time.perf_counter()
            if self._own_seconds:
                self._own_seconds[-1] += now - start
            steps, (earlier, before) = self.steps, self._last_timed
            if earlier:
                self._intervals.append((now - before) / (steps - earlier))
            self._last_timed = (steps, now)

    def _measure(self, record: OptimizerRecord, optimizer: Optimizer) -> None:
        """Record an optimizer's step, or let its Clipper do so."""
        record.is_measured = True
        try:
            record.call = self._calls.of(optimizer) if self._calls.are_waiting else None
            clipper = clipper_of(optimizer)
            clip_coef: Norm = 1.0
            if record.call is not None:
                clip_coef = record.call.clip_coef
            if clipper is not None:
                if record.loss is not None and clipper.loss is None:
                    clipper.loss = record.loss
            elif record.call is not None:
                self._record_call(record, record.call, skipped=False)
            else:
                self._record_norm(record, optimizer)
            if _measures_layers(record.steps) and isinstance(clip_coef, float) and clip_coef > 0:
                self._measure_layers(record, optimizer, clip_coef)
        except Exception as error:  # the program must continue, whatever its gradients
            record.problem = _no_norms(error)

    def _record_call(self, record: OptimizerRecord, call: Call, skipped: bool) -> None:
        """Record a step whose gradients torch's functions have clipped."""
        record.clipped_by[call.function] += 1
        for earlier in call.not_taken:
            norm, max_norm, clip_coef = earlier.total_norm, earlier.max_norm, earlier.clip_coef
            record.history.append(record.steps, norm, max_norm, clip_coef, skipped=True)
            record.steps += 1
        norm, max_norm, clip_coef = call.total_norm, call.max_norm, call.clip_coef
        record.history.append(record.steps, norm, max_norm, clip_coef, skipped, record.loss)
        if call.nonfinite:
            self._note_nonfinite(record, record.steps, call.nonfinite)

    def _record_norm(self, record: OptimizerRecord, optimizer: Optimizer) -> None:
        """Record a step whose norm is not measured otherwise."""
        parameters = parameters_of(optimizer)
        norm = norm_of(parameters)
        norm = 0.0 if norm is None else _unscaled(norm, optimizer)
        record.history.append(record.steps, norm, math.inf, 1.0, loss=record.loss)
        if record.on_host and not math.isfinite(norm):
            self._note_nonfinite(record, record.steps, nonfinite_ids(parameters))

    def _measure_layers(self, record: OptimizerRecord, optimizer: Optimizer, clip_coef: float) -> None:
        """Record the norm of each parameter before clipping."""
        parameters = with_gradient(parameters_of(optimizer))
        if parameters:
            names = [record.names.get(id(p), f"parameter {i}") for i, p in enumerate(parameters)]
            record.layers.append(record.steps, names, norms_of(parameters) / clip_coef)

    def _read_clipper(self, record: OptimizerRecord, optimizer: Optimizer, clipper: Clipper) -> None:
        """Read what a Clipper did in the last step."""
        if optimizer in self._trial_clippers and not self.trial.replaces:
            # It handles steps that are not finite; the program itself may have clipped before.
            last = clipper.last
            if last is not None and record.call is not None:
                self._record_call(record, record.call, last.skipped)
            elif last is not None:
                norm, max_norm, clip_coef = last.total_norm, last.max_norm, last.clip_coef
                record.history.append(record.steps, norm, max_norm, clip_coef, last.skipped, record.loss)
        else:
            record.history = clipper.history
            record.clipped_by["a Clipper"] += 1
        if record.on_host and clipper.last is not None and clipper.last.nonfinite:
            self._note_nonfinite(record, clipper.last.step, nonfinite_ids(parameters_of(optimizer)))

    def _note_nonfinite(self, record: OptimizerRecord, step: int, parameters: Sequence[int]) -> None:
        if len(record.nonfinite) < _MOST_NONFINITE and step not in record.nonfinite:
            record.nonfinite[step] = [record.names[key] for key in parameters if key in record.names]

    # Optimizers and Clippers

    def _register(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> OptimizerRecord | None:
        """Add an optimizer, or read its parameters again if it has a new group."""
        if creates_state(optimizer, args, kwargs, lambda: norm_of(parameters_of(optimizer)) or 0.0):
            return None
        record = self._by_id.get(id(optimizer))
        if record is not None:
            record.read_parameters(optimizer)
        else:
            record = OptimizerRecord(optimizer, self._forget)
            self.optimizers.append(record)
            self._by_id[id(optimizer)] = record
        if self.trial.replaces:
            for group in optimizer.param_groups:
                if group.get("max_norm") is not None:
                    del group["max_norm"]
        if self.trial.clips and clipper_of(optimizer) is None:
            self._add_trial_clipper(record, optimizer)
        self._calls.register(optimizer, record.names)
        return record

    def _forget(self, gone: ref[Optimizer]) -> None:
        """Forget optimizers that are gone, as another object may get the same ``id``."""
        for key, record in list(self._by_id.items()):
            if record.optimizer is gone:
                del self._by_id[key]

    def _add_trial_clipper(self, record: OptimizerRecord, optimizer: Optimizer) -> None:
        others = companions(optimizer, {*self._by_id, *map(id, registry.clippers)})
        self._is_adding_clipper = True
        try:
            clipper = self.trial.clipper_for([optimizer, *others] if others else optimizer)
            for each in [optimizer, *others]:
                self._trial_clippers[each] = clipper
            if others:
                self._rounds[clipper] = OpenRound()
        except (TypeError, ValueError) as error:
            record.problem = f"not clipped as asked: {error}"
        finally:
            self._is_adding_clipper = False

    def _split_round(self, optimizer: Optimizer) -> None:
        """Give each optimizer its own Clipper if they do not step on the same backward pass."""
        clipper = self._trial_clippers.get(optimizer)
        if clipper is None or clipper not in self._rounds:
            return
        if not self._rounds[clipper].step(optimizer, self._losses.backwards):
            optimizers = clipper.optimizers
            self._remove_trial_clippers(optimizers)
            self._is_adding_clipper = True
            try:
                for each in optimizers:
                    self._trial_clippers[each] = self.trial.clipper_for(each)
            finally:
                self._is_adding_clipper = False

    def _remove_trial_clippers(self, optimizers: Sequence[Any]) -> None:
        """Detach this run's Clipper from optimizers for which the program makes its own."""
        for optimizer in optimizers:
            if isinstance(optimizer, Optimizer) and optimizer in self._trial_clippers:
                clipper = self._trial_clippers[optimizer]
                for each in clipper.optimizers:
                    self._trial_clippers.pop(each, None)
                clipper.detach()


def _no_norms(error: Exception) -> str:
    return f"norms cannot be taken: {type(error).__name__}: {error}"


def _measures_layers(step: int) -> bool:
    """Whether the parameters are measured one by one in a step."""
    return step % _EVERY_FIRST == 0 if step < _FIRST_STEPS else step % _EVERY == 0


def _is_timed(step: int) -> bool:
    """Whether a step is timed: one in which recording does its usual work."""
    return step % _EVERY_TIMED == _TIMED


def _unscaled(norm: Norm, optimizer: Optimizer) -> Norm:
    """A norm without a GradScaler's scale."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return norm
    return norm / scale.to(norm) if isinstance(norm, Tensor) else norm / float(scale)
