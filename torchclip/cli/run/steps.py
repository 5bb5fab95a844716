"""Every step of every optimizer of a program, recorded through torch's global hooks."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import ref

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from torchclip._core.memory import not_compiled
from torchclip.cli.run.calls import Call, Calls, Site, joint_effect, site_of_caller
from torchclip.cli.run.gradients import Number, nonfinite_ids, norm_of, norms_of
from torchclip.cli.run.losses import LossRecorder, in_backward
from torchclip.cli.run.mistakes import Mistakes, StepFacts
from torchclip.cli.run.names import Modules
from torchclip.cli.run.optimizer import OptimizerRecord
from torchclip.cli.run.trial import Effect, Trial
from torchclip.clipper import registry
from torchclip.clipper.closure import creates_state, with_closure
from torchclip.clipper.optimizers import parameters_of
from torchclip.clipper.step import stepping

# How often parameters are measured one by one: in the first steps, and in later ones.
_FIRST_STEPS, _EVERY_FIRST, _EVERY = 64, 4, 32
_MOST_NONFINITE = 100  # the number of steps whose non-finite parameters are kept


class StepRecorder:
    """Records each step of a program's optimizers, and clips as a trial says where the program does not.

    A Clipper measures its own optimizer, and clipping functions measure the gradients that they clip; for
    other optimizers the norm is measured before each step.

    Attributes:
        trial: the clipping to try.
        optimizers: the record of each, in the order of their first steps.
        mistakes: what the program may do wrong.
        calls: the latest calls of clipping functions.
    """

    def __init__(self, trial: Trial, calls: Calls, losses: LossRecorder) -> None:
        self.trial = trial
        self.optimizers: list[OptimizerRecord] = []
        self.mistakes = Mistakes()
        self.calls, self._losses = calls, losses
        self._modules = Modules()
        self._by_id: dict[int, OptimizerRecord] = {}
        self._clipper_sites: dict[int, Site] = {}  # by the id of the optimizer
        self._known: set[int] = set()  # the id of each parameter of an optimizer that has stepped

    def attach(self, stack: ExitStack) -> None:
        """Record until the stack is closed."""
        # This code must not be compiled together with the program's step.
        before, after = (not_compiled(hook) for hook in (self._before_step, self._after_step))
        self._modules.attach(stack)
        stack.callback(register_optimizer_step_pre_hook(before).remove)
        stack.callback(register_optimizer_step_post_hook(after).remove)
        stack.callback(registry.set_adjustment(self._adjusted))

    def _adjusted(self, optimizer: Any, max_norm: Any) -> Any:
        """The ``max_norm`` of a Clipper that the program makes; where it does so is recorded."""
        for each in optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]:
            self._clipper_sites[id(each)] = site_of_caller()
        return self.trial.new_max_norm() if self.trial.replaces else max_norm

    # One step

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        around = _around(optimizer)
        if around:
            self._note_wrapped(around[-1], optimizer)
            return None
        if id(optimizer) not in self._by_id and creates_state(
            optimizer, args, kwargs, lambda: norm_of(parameters_of(optimizer))
        ):
            return None
        record = self._record_of(optimizer)
        record.is_measured = record.is_tried = False
        replaced = with_closure(args, kwargs, functools.partial(self._call_closure, record, optimizer))
        if replaced is None:
            self._measure(record, optimizer)
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
        """Record the first call of a step's closure, with its loss and gradients; a trial clips in each."""
        result = closure(*args, **kwargs)
        if not record.is_measured:
            self._measure(record, optimizer)
        elif record.is_tried:
            self._try(record, optimizer, norm_of(parameters_of(optimizer)))
        return result

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        record = self._by_id.get(id(optimizer))
        if record is None or not record.is_measured or _around(optimizer):
            return
        self._losses.take()  # of later calls of a closure
        record.seen = self.calls.number, self._losses.backwards
        clipper = registry.clipper_of(record.with_clipper(optimizer))
        with _problems_of(record):
            if clipper is not None:
                self._read_clipper(record, optimizer, clipper)
            elif record.steps >= record.history._clipped_sizes.next_step:
                record.history._clipped_sizes.measure(record.steps, [optimizer])
        record.steps += 1

    def _measure(self, record: OptimizerRecord, optimizer: Optimizer) -> None:
        """Record an optimizer's step, or let its Clipper do so."""
        record.is_measured = True
        if in_backward():
            record.rounds.append(self._losses.backwards)
        loss, clipper = self._losses.take(), registry.clipper_of(record.with_clipper(optimizer))
        facts = self._facts(record, optimizer)
        self.mistakes.judge(facts)
        record.gradients = frozenset(facts.gradients.values())
        effect = joint_effect(facts.used) if facts.used else None
        if _measures_layers(record.steps):
            with _problems_of(record):
                self._measure_layers(record, optimizer, 1.0 if effect is None else effect.clip_coef)
        if clipper is None:
            with _problems_of(record):
                self._record(record, optimizer, facts, effect, loss)
        elif loss is not None and clipper.loss is None:
            clipper.loss = loss

    def _facts(self, record: OptimizerRecord, optimizer: Optimizer) -> StepFacts:
        names = record.names.keys()
        recent = self.calls.since(record.seen[0])
        own = [call for call in recent if call.exists() and not call.parameters.isdisjoint(names)]
        return StepFacts(
            record,
            (self._losses.backwards, record.seen[1]),
            self._losses.updates,
            own,
            [call for call in recent if not call.exists() or call.parameters.isdisjoint(self._known)],
            {id(p): id(p.grad) for p in parameters_of(optimizer) if p.grad is not None},
            registry.clipper_of(record.with_clipper(optimizer)) is not None,
            functools.partial(_was_scaled, optimizer, self._losses.unscaled()),
        )

    def _record(
        self,
        record: OptimizerRecord,
        optimizer: Optimizer,
        facts: StepFacts,
        effect: Effect | None,
        loss: Number | None,
    ) -> None:
        """Record a step of an optimizer without a Clipper."""
        for call in facts.calls:
            if call.is_skipped and call not in facts.used:  # a GradScaler has skipped the step
                record.history.append(record.steps, *call.effect, skipped=True)
                record.steps += 1
        bad = [key for call in facts.used for key in call.nonfinite]
        if effect is not None:
            functions = dict.fromkeys(f"{call.function} at {call.site}" for call in facts.used)
            record.clipped_by[" and ".join(functions)] += 1
        else:
            parameters = parameters_of(optimizer)
            norm = norm_of(parameters, getattr(optimizer, "grad_scale", None))
            if record.on_host and not math.isfinite(norm):
                bad = nonfinite_ids(parameters)
            effect = self._try(record, optimizer, norm)
        record.history.append(record.steps, *effect, loss=loss)
        self._note_nonfinite(record, record.steps, bad)

    def _try(self, record: OptimizerRecord, optimizer: Optimizer, norm: Number) -> Effect:
        """Clip an optimizer that the program does not clip, if a trial says so."""
        if self.trial.replaces:
            record.is_tried = True
            try:
                scale = getattr(optimizer, "grad_scale", None)
                return self.trial.clip(id(record), parameters_of(optimizer), norm, scale)
            except Exception as error:  # as in _problems_of
                record.problem = f"not clipped as asked: {error}"
        return Effect(norm, math.inf, 1.0)

    def _note_wrapped(self, wrapper: Optimizer, optimizer: Optimizer) -> None:
        """Take note of an optimizer that steps within another one's step, if it has a Clipper."""
        record = self._by_id.get(id(wrapper))
        if record is not None and registry.clipper_of(optimizer) is not None:
            record.wrapped = ref(optimizer)

    def _measure_layers(self, record: OptimizerRecord, optimizer: Optimizer, clip_coef: Number) -> None:
        """Record the norm of each parameter before clipping."""
        if isinstance(clip_coef, float) and clip_coef == 0:
            return
        parameters, norms = norms_of(parameters_of(optimizer))
        if parameters:
            scale = getattr(optimizer, "grad_scale", None)
            names = [record.names.get(id(p), f"parameter {i}") for i, p in enumerate(parameters)]
            record.layers.append(record.steps, names, norms / clip_coef / (1.0 if scale is None else scale))

    def _read_clipper(self, record: OptimizerRecord, optimizer: Optimizer, clipper: Any) -> None:
        """Read what a Clipper did in the last step."""
        record.history = clipper.history
        site = self._clipper_sites.get(id(record.with_clipper(optimizer)))
        record.clipped_by["a Clipper" if site is None else f"the Clipper at {site}"] += 1
        if self.trial.replaces:
            self.trial.replaced["Clipper"] += 1
        last = clipper.last if record.on_host else None
        if last is not None and last.nonfinite:
            self._note_nonfinite(record, last.step, nonfinite_ids(parameters_of(optimizer)))

    def _note_nonfinite(self, record: OptimizerRecord, step: int, parameters: Sequence[int]) -> None:
        if parameters and len(record.nonfinite) < _MOST_NONFINITE and step not in record.nonfinite:
            record.nonfinite[step] = [record.names[key] for key in parameters if key in record.names]

    def _record_of(self, optimizer: Optimizer) -> OptimizerRecord:
        """The record of an optimizer: new in its first step, with new names if it has a new group."""
        key = id(optimizer)
        record = self._by_id.get(key)
        if record is not None and record.groups == len(optimizer.param_groups):
            return record
        if record is not None:
            record.read_parameters(optimizer, self._modules)
        else:
            # Another object may get the same id.
            record = OptimizerRecord(optimizer, self._modules, lambda _: self._by_id.pop(key, None))
            self.optimizers.append(record)
            self._by_id[key] = record
        self._known.update(record.names)
        if self.trial.replaces:  # also the thresholds of groups, which a Clipper of the program uses
            for group in optimizer.param_groups:
                if group.get("max_norm") is not None:
                    del group["max_norm"]
        return record


def _around(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers around the step that calls a hook: the same one, or others that wrap it.

    An exception may end a step at any time, so the stack is asked, and nothing is remembered.
    """
    first = {id(p) for p in parameters_of(optimizer)[:1]}
    found = [
        each
        for each in stepping(sys._getframe(1))
        if each is optimizer or not first.isdisjoint(map(id, parameters_of(each)))
    ]
    return found[1:]


def _was_scaled(optimizer: Optimizer, unscaled: frozenset[int] | None, call: Call) -> bool:
    """Whether a call clipped gradients that were multiplied by a GradScaler's scale, and now are not."""
    divides = getattr(optimizer, "grad_scale", None) is not None
    is_unscaled = divides or id(optimizer) in (unscaled or ())
    return is_unscaled and call.unscaled is not None and id(optimizer) not in call.unscaled


@contextmanager
def _problems_of(record: OptimizerRecord) -> Iterator[None]:
    """Note what goes wrong, as the program must continue, whatever its gradients."""
    try:
        yield
    except Exception as error:
        record.problem = f"norms cannot be taken: {type(error).__name__}: {error}"


def _measures_layers(step: int) -> bool:
    """Whether the parameters are measured one by one in a step."""
    return step % (_EVERY_FIRST if step < _FIRST_STEPS else _EVERY) == 0
