"""Every step of every optimizer of a program, recorded through torch's global hooks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from torchclip._core.rounds import not_compiled
from torchclip._core.scalars import divided
from torchclip.cli.run.calls import Call, Calls
from torchclip.cli.run.clippers import TrialClippers
from torchclip.cli.run.gradients import nonfinite_ids, norm_of, norms_of
from torchclip.cli.run.losses import LossRecorder
from torchclip.cli.run.optimizer import OptimizerRecord
from torchclip.cli.run.trial import Trial
from torchclip.clipper.clipper import Clipper
from torchclip.clipper.optimizers import parameters_of
from torchclip.clipper.registry import clipper_of
from torchclip.clipper.step import creates_state, with_closure

# How often parameters are measured one by one: in the first steps, and in later ones.
_FIRST_STEPS, _EVERY_FIRST, _EVERY = 64, 4, 32
_MOST_NONFINITE = 100  # the number of steps whose non-finite parameters are kept


class StepRecorder:
    """Records each step of a program's optimizers, and applies the clipping of a trial.

    A Clipper measures its own optimizer, and torch's functions measure the gradients that they clip; for
    other optimizers the norm is measured before each step.

    Attributes:
        trial: the clipping to try.
        optimizers: the record of each, in the order of their first steps.
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
        self._calls = calls
        self._losses = losses
        self._progress = progress
        self._by_id: dict[int, OptimizerRecord] = {}
        self._clippers = TrialClippers(trial, losses, self._by_id)
        # This code must not be compiled together with the program's step.
        self._hooks = not_compiled(self._before_step), not_compiled(self._after_step)
        self._detach: list[Callable[[], None]] = []
        # Of the steps after the first one: their number, the time that recording took, begin and end.
        self._timed, self._seconds, self._begin, self._end = -1, 0.0, 0.0, 0.0

    @property
    def seconds(self) -> float:
        """The mean time that recording takes in a step, without the look-up of names; 0 before the second."""
        return self._seconds / self._timed if self._timed > 0 else 0.0

    @property
    def between(self) -> float:
        """The mean time from one step to the next."""
        return (self._end - self._begin) / self._timed if self._timed > 0 else 0.0

    def attach(self) -> None:
        """Record from now on."""
        self._detach += [
            register_optimizer_step_pre_hook(self._hooks[0]).remove,
            register_optimizer_step_post_hook(self._hooks[1]).remove,
            self._clippers.attach(),
        ]

    def detach(self) -> None:
        """Stop recording; Clippers of the trial stay."""
        while self._detach:
            self._detach.pop()()

    # One step

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        record = self._by_id.get(id(optimizer))
        if record is None or record.groups != len(optimizer.param_groups):
            record = self._register(optimizer, args, kwargs)
        start = time.perf_counter()
        if record is None or not record.step.begin():
            return None
        if self.trial.clips:
            problem = self._clippers.begin_step(optimizer, len(args) > 1 or bool(kwargs))
            record.problem = problem or record.problem
        record.rounds.append((record.steps, self._losses.backwards))
        record.loss, record.is_measured = self._losses.take(), False
        record.call = record.clipper = None
        replaced = None
        if len(args) > 1 or kwargs:
            measured_after = partial(self._call_closure, record, optimizer)
            replaced = with_closure(type(optimizer).step, args, kwargs, measured_after)
        if replaced is None:
            self._measure(record, optimizer)
        self._seconds += time.perf_counter() - start
        return replaced

    def _call_closure(
        self,
        record: OptimizerRecord,
        optimizer: Optimizer,
        closure: Callable[..., Any],
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Record the first call of a step's closure, with its loss and gradients."""
        result = closure(*args, **kwargs)
        if not record.is_measured:
            loss = self._losses.take()
            record.loss = loss if record.loss is None else record.loss
            self._measure(record, optimizer)
        return result

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        start = time.perf_counter()
        record = self._by_id.get(id(optimizer))
        if record is None or not record.step.end():
            return
        if len(args) > 1 or kwargs:  # later calls of the closure do not count
            self._losses.take()
            self._calls.take(record.names.keys())
        if record.clipper is not None:
            clipper, record.clipper = record.clipper, None
            problem = self._clippers.end_step(optimizer)
            if problem is None:
                self._read_clipper(record, optimizer, clipper)
            else:
                record.problem = problem
                self._record_unclipped(record, optimizer)
        # A Clipper does this for its own history.
        if record.steps >= record.history._clipped_sizes.next_step and record.problem is None:
            try:
                record.history._clipped_sizes.measure(record.steps, [optimizer])
            except Exception as error:  # as in _measure
                record.problem = _no_norms(error)
        record.steps += 1
        if self._progress is not None:
            self._progress(record)
        self._timed, self._end = self._timed + 1, time.perf_counter()
        self._seconds += self._end - start
        if self._timed == 0:
            self._seconds, self._begin = 0.0, self._end

    def _measure(self, record: OptimizerRecord, optimizer: Optimizer) -> None:
        """Record an optimizer's step, or let its Clipper do so."""
        record.is_measured = True
        try:
            call = record.call = self._calls.take(record.names.keys())
            clipper = record.clipper = clipper_of(optimizer)
            if clipper is not None:
                if record.loss is not None and clipper.loss is None:
                    clipper.loss = record.loss
            elif call is not None:
                self._record_call(record, call, skipped=False)
            else:
                self._record_norm(record, optimizer)
            clip_coef = 1.0 if call is None else call.clip_coef
            if _measures_layers(record.steps) and isinstance(clip_coef, float) and clip_coef > 0:
                self._measure_layers(record, optimizer, clip_coef)
        except Exception as error:  # the program must continue, whatever its gradients
            record.problem = _no_norms(error)

    def _record_call(self, record: OptimizerRecord, call: Call, skipped: bool) -> None:
        """Record a step whose gradients torch's functions have clipped."""
        record.clipped_by[call.function] += 1
        for earlier in call.not_taken:
            record.history.append(record.steps, *earlier.numbers, skipped=True)
            record.steps += 1
        record.history.append(record.steps, *call.numbers, skipped, record.loss)
        if call.nonfinite:
            self._note_nonfinite(record, record.steps, call.nonfinite)

    def _record_norm(self, record: OptimizerRecord, optimizer: Optimizer) -> None:
        """Record a step whose norm is not measured otherwise."""
        parameters = parameters_of(optimizer)
        norm = norm_of(parameters, getattr(optimizer, "grad_scale", None))
        norm = 0.0 if norm is None else norm
        record.history.append(record.steps, norm, math.inf, 1.0, loss=record.loss)
        if record.on_host and not math.isfinite(norm):
            self._note_nonfinite(record, record.steps, nonfinite_ids(parameters))

    def _measure_layers(self, record: OptimizerRecord, optimizer: Optimizer, clip_coef: float) -> None:
        """Record the norm of each parameter before clipping."""
        parameters, norms = norms_of(parameters_of(optimizer), getattr(optimizer, "grad_scale", None))
        if parameters:
            names = [record.names.get(id(p), f"parameter {i}") for i, p in enumerate(parameters)]
            record.layers.append(record.steps, names, divided(norms, [clip_coef]))

    def _read_clipper(self, record: OptimizerRecord, optimizer: Optimizer, clipper: Clipper) -> None:
        """Read what a Clipper did in the last step."""
        is_own = optimizer in self._clippers
        if is_own and not self.trial.replaces:
            # It handles steps that are not finite; the program itself may have clipped before.
            last = clipper.last
            if last is not None and record.call is not None:
                self._record_call(record, record.call, last.skipped)
            elif last is not None:
                record.history.append(record.steps, *last[1:4], last.skipped, record.loss)
        else:
            record.history = clipper.history
            record.clipped_by["a Clipper"] += 1
            if self.trial.replaces and not is_own:
                self.trial.replaced["Clipper"] += 1
        last = clipper.last if record.on_host else None
        if last is not None and last.nonfinite:
            self._note_nonfinite(record, last.step, nonfinite_ids(parameters_of(optimizer)))

    def _record_unclipped(self, record: OptimizerRecord, optimizer: Optimizer) -> None:
        """Record a step whose gradients the trial's Clipper could not clip."""
        try:
            if record.call is not None:
                self._record_call(record, record.call, skipped=False)
            else:
                self._record_norm(record, optimizer)
        except Exception as error:  # as in _measure
            record.problem = _no_norms(error)

    def _note_nonfinite(self, record: OptimizerRecord, step: int, parameters: Sequence[int]) -> None:
        if len(record.nonfinite) < _MOST_NONFINITE and step not in record.nonfinite:
            record.nonfinite[step] = [record.names[key] for key in parameters if key in record.names]

    def _register(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> OptimizerRecord | None:
        """Add an optimizer, or read its parameters again if it has a new group."""
        if creates_state(optimizer, args, kwargs, lambda: norm_of(parameters_of(optimizer)) or 0.0):
            return None
        key = id(optimizer)
        record = self._by_id.get(key)
        if record is None:
            # Another object may get the same id.
            record = OptimizerRecord(optimizer, lambda _: self._by_id.pop(key, None))
            self.optimizers.append(record)
            self._by_id[key] = record
        else:
            record.read_parameters(optimizer)
        self._calls.known.update(record.names)
        problem = self._clippers.add(optimizer)
        record.problem = problem or record.problem
        return record


def _no_norms(error: Exception) -> str:
    return f"norms cannot be taken: {type(error).__name__}: {error}"


def _measures_layers(step: int) -> bool:
    """Whether the parameters are measured one by one in a step."""
    return step % (_EVERY_FIRST if step < _FIRST_STEPS else _EVERY) == 0
