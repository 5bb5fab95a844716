"""Rounds: the optimizers' steps after one backward pass, clipped once and recorded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import and_
from threading import RLock
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torchclip._core import gather, scalars
from torchclip._core.batch import Batch, Norm, Norms
from torchclip.clipper import fused
from torchclip.clipper.backward import check_in_backward
from torchclip.clipper.clipping import Decision, change, decide
from torchclip.clipper.closure import creates_state, with_closure
from torchclip.clipper.loss import PendingLoss
from torchclip.clipper.nonfinite import hide_gradients, is_skipped_by_scaler
from torchclip.clipper.optimizers import parameters_of
from torchclip.clipper.sets import Gradients
from torchclip.clipper.settings import Settings
from torchclip.clipper.skip_above import InARow
from torchclip.clipper.step import Step, called
from torchclip.history.history import History
from torchclip.history.records import Record, as_records, norms_by_name

Loss: TypeAlias = float | Tensor | None


class Row(NamedTuple):
    """The arguments of ``History.append``."""

    step: int
    total_norm: Norm
    max_norm: Norm
    clip_coef: Norm
    skipped: bool | Tensor
    loss: Loss
    clipped_norm: Norm | None
    nonfinite: bool | Tensor | None


class _Open:
    """The round that is open, and what will be recorded of it.

    Args:
        opener: the optimizer that opened it.
        number: its number.
        settings: the Clipper's.
        is_local: whether it must be clipped without other ranks.

    Attributes:
        rows: a row for each clipping: for each call of a closure.
        layers: names and norms of single parameters.
        skipped: whether the round is skipped.
        by_scaler: with several optimizers: whether a GradScaler skips the step of each that has begun one.
    """

    __slots__ = ("by_scaler", "is_local", "layers", "number", "opener", "rows", "settings", "skipped")

    def __init__(self, opener: int, number: int, settings: Settings, is_local: bool) -> None:
        self.opener, self.number, self.settings, self.is_local = opener, number, settings, is_local
        self.rows: list[Row] = []
        self.layers: tuple[list[str], Norms] | None = None
        self.skipped: bool | Tensor = False
        self.by_scaler: dict[int, bool | Tensor] = {}


class Rounds:
    """The steps of some optimizers, from their hooks' point of view.

    The first optimizer to step in a round clips the gradients of all of them; the others step with the
    clipped gradients.  The round ends when every optimizer has stepped, when one steps again, or when one
    that has stepped has a new gradient.  A single optimizer has a round for each step.

    Args:
        steps: the steps of the optimizers.
        settings: what the user asks for.
        lock: held while a round is opened or recorded, so that other threads see it before or after.

    Attributes:
        history: what is recorded.
        number: the number of the next round, or of the open one.
        hooks: the handle of the pre hook of each optimizer.
    """

    def __init__(self, steps: Sequence[Step], settings: Settings, lock: RLock) -> None:  # type: ignore[valid-type]
        self.settings, self.history, self.loss = settings, History(), PendingLoss()
        self.number = 0
        self.hooks: list[RemovableHandle] = []
        self._steps, self._lock = steps, lock
        self._open: _Open | None = None

    def before_step(
        self, index: int, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Clip the gradients now or after a closure; returns other arguments for the step, or None."""
        step = self._steps[index]
        if not step.begin():
            return None
        try:
            return self._begin(index, optimizer, args, kwargs)
        except BaseException:
            self.loss.value = None
            step.fail()
            raise

    def _begin(
        self, index: int, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        step, has_more = self._steps[index], len(args) > 1 or bool(kwargs)
        if "found_inf" in vars(optimizer):
            fused.override(step)  # takes note of what a GradScaler has set, as the step may fail
        if has_more and creates_state(optimizer, args, kwargs, partial(self._norm_of, optimizer)):
            step.counts = False
            return None
        joins = len(self._steps) > 1 and self._goes_on(index)
        if joins:
            self._join(index)
        else:
            self._open_round(index)
        around = self._call_unchanged if joins else self._call_and_clip
        replaced = with_closure(args, kwargs, partial(around, index)) if has_more else None
        if replaced is None and not joins:
            self._clip(index)
        return replaced

    def after_step(self, index: int) -> None:
        """End a step; a round is in the history, and uses its number, only if a step was taken in it."""
        step, opened = self._steps[index], self._open
        if not step.is_over():
            return
        with self._lock:
            ends = False
            step.undo("finished")
            if step.counts and opened is not None:
                step.stepped = True
                ends = all(each.stepped or each.is_gone() for each in self._steps)
                if ends:
                    self.close()
                else:
                    step.fingerprint = self._batch_of(index).fingerprint()
            step.end()
        if ends and opened is not None and opened.rows:
            self._measure_clipped(opened.number)

    def close(self) -> None:
        """Record the round that is open, if a step was taken in it.  The caller holds the lock.

        An interrupt may have it called again after the round was recorded.
        """
        opened = self._open
        if opened is not None and opened.rows and any(step.stepped for step in self._steps):
            if not self._is_recorded(opened):
                self.history.extend(self._rows_of(opened))
                if opened.layers is not None:
                    self.history.layers.append(opened.number, *opened.layers)
            opened.settings.end_step()
            self.number = opened.number + 1
        self.forget()

    def forget(self) -> None:
        """Discard the open round, if there is one."""
        self._open = None
        for step in self._steps:
            step.stepped = False

    def _rows_of(self, opened: _Open) -> list[Row]:
        """What is recorded of a round, given whether a GradScaler has skipped all its steps."""
        *rows, row = opened.rows
        skips = [
            opened.by_scaler[i]
            for i, step in enumerate(self._steps)
            if step.stepped and i in opened.by_scaler
        ]
        skipped = reduce(and_, skips) if skips else False
        if skipped is True:
            row = row._replace(max_norm=math.inf, clip_coef=1.0, skipped=True)
        elif isinstance(skipped, Tensor):
            row = row._replace(skipped=torch.as_tensor(row.skipped, device=skipped.device) | skipped)
        return [*rows, row]

    def _is_recorded(self, opened: _Open) -> bool:
        return self.history.last_step() == opened.number

    def _measure_clipped(self, number: int) -> None:
        """Measure the gradients of a round that has just ended, for the history's note on stalls."""
        sizes = self.history.clipped_sizes
        if number >= sizes.next_step:
            sizes.measure(number, self._optimizers)

    def is_running(self) -> bool:
        """Whether any step runs, in any thread; undoes what failed steps have left."""
        running = [step.is_running() for step in self._steps]  # each, as it ends failed steps
        return any(running)

    def is_within(self) -> bool:
        """Whether a round is open and neither recorded nor failed: a state is then that of before it.

        The caller holds the lock.
        """
        opened = self._open
        begun = self.is_running() or any(step.stepped for step in self._steps)
        return opened is not None and begun and not self._is_recorded(opened)

    def steps(self) -> int:
        """The number of rounds that are recorded.  The caller holds the lock."""
        opened = self._open
        return self.number + int(opened is not None and self._is_recorded(opened))

    def skips(self, count: InARow) -> int:
        """How many steps in a row were skipped, of those that are recorded.  The caller holds the lock."""
        opened = self._open
        return int(count.then if opened is not None and self._is_recorded(opened) else count.count)

    # Opening a round, or going on with the open one

    def _open_round(self, index: int) -> None:
        """Begin a round, and end the one before, whose other optimizers did not step."""
        is_local = check_in_backward(self._optimizers, self.settings)
        with self._lock:
            self.close()
            settings = self.settings
            settings.begin_step()
            self._open = opened = _Open(index, self.number, settings, is_local)
        if len(self._steps) > 1:
            opened.by_scaler[index] = is_skipped_by_scaler(self._steps[index].optimizer)

    def _goes_on(self, index: int) -> bool:
        """Whether an optimizer steps with gradients that were clipped in the open round.

        Raises:
            RuntimeError: if its gradients have changed since then.
        """
        for step in self._steps:
            if step is not self._steps[index]:
                step.is_running()  # which finds those that have failed
        opened, step = self._open, self._steps[index]
        if opened is None or self._has_failed(opened, index) or step.stepped:
            return False
        if any(other.stepped and self._has_new(i) for i, other in enumerate(self._steps)):
            return False
        self._check_unscaled(index)
        if self._has_new(index):
            raise RuntimeError(
                f"the gradients of {called(index, step.optimizer)} have changed since they were clipped, "
                "before its step; with a GradScaler call `scaler.unscale_(optimizer)` for each optimizer of "
                "the Clipper before the first one steps; optimizers that step after backward passes of their "
                "own, as in a GAN, need a Clipper each. This step was called off"
            )
        return True

    def _has_failed(self, opened: _Open, index: int) -> bool:
        """Whether the step that opened a round has failed, so that there is none."""
        opener = self._steps[opened.opener]
        return not opener.stepped and (opened.opener == index or not opener.is_running())

    def _has_new(self, index: int) -> bool:
        """Whether an optimizer has gradients that have changed, but for those that became 0."""
        batch, before = self._batch_of(index), self._steps[index].fingerprint
        now = batch.fingerprint()
        if now == before:
            return False
        known = {before[i : i + 8] for i in range(0, len(before), 8)}
        changed = [grad for i, grad in enumerate(batch.all) if now[8 * i : 8 * i + 8] not in known]
        return bool(changed) and not float(gather.tensors(changed).norm(math.inf)) <= 0

    def _batch_of(self, index: int) -> Batch:
        return gather.gradients(parameters_of(self._steps[index].optimizer))

    def _join(self, index: int) -> None:
        """Let another optimizer step with the gradients that were clipped for all."""
        opened, step = self._open, self._steps[index]
        assert opened is not None
        opened.by_scaler[index] = is_skipped_by_scaler(step.optimizer)
        self._skip(step, opened)

    def _call_and_clip(self, index: int, closure: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self._steps[index].undo("again")
        loss = closure(*args, **kwargs)
        self._clip(index)
        return loss

    def _call_unchanged(self, index: int, closure: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a closure that must not change the gradients, such as those that frameworks pass on."""
        loss = closure(*args, **kwargs)
        if self._has_new(index):
            raise RuntimeError(
                f"the closure of {called(index, self._steps[index].optimizer)} computed new gradients, but "
                "those of this round were clipped when another optimizer of the Clipper stepped; only the "
                "first one to step may take a closure"
            )
        return loss

    # Clipping

    def _clip(self, index: int) -> None:
        """Measure, decide, change, record and tell."""
        opened, step = self._open, self._steps[index]
        assert opened is not None
        settings, number = opened.settings, opened.number
        self._check_unscaled(index)
        gradients = Gradients(self._optimizers, settings, opened.is_local)
        gradients.measure()
        if settings.layers_every and number % settings.layers_every == 0:
            names, _, norms = settings.names.norms(gradients.optimizers, settings.norm_type)
            opened.layers = names, norms  # of the last call of a closure
        loss = self.loss.take()  # now, as the step may fail
        decision, clipped_norm = decide(gradients, settings, step.optimizer, number), None
        opened.skipped = decision.skipped
        if decision.skipped is not True:
            hook = self.hooks[index]
            decision, clipped_norm = change(gradients, settings, decision, step, hook, opened.is_local)
        row = _row(number, gradients, decision, loss, clipped_norm)
        opened.rows.append(row)
        if settings.on_clip is not None:
            self._tell(settings.on_clip, row, opened)
        for i, other in enumerate(self._steps):
            if i != index:
                other.fingerprint = self._batch_of(i).fingerprint()
        self._skip(step, opened)  # now that they are marked, as another optimizer may share them

    def _tell(self, on_clip: Callable[[Record], object], row: Row, opened: _Open) -> None:
        """Tell the user's function of a step."""
        (record,) = as_records([row])
        if opened.layers is not None:
            record = record._replace(layers=norms_by_name(*opened.layers))
        on_clip(record)

    def _skip(self, step: Step, opened: _Open) -> None:
        """Keep a step from changing anything, if its round is skipped by the Clipper."""
        if opened.skipped is False or not self._may_skip(opened.settings):
            return
        if opened.skipped is True:
            hide_gradients(step)
            return
        # Hiding the gradients would wait for the device.  A GradScaler may have its own reason to skip.
        by_scaler = is_skipped_by_scaler(step.optimizer)
        fused.override(step).skip_where(opened.skipped | by_scaler)

    def _may_skip(self, settings: Settings) -> bool:
        """Whether the Clipper skips steps, and not a GradScaler alone."""
        return len(self._steps) > 1 or settings.nonfinite == "skip" or settings.skip_above is not None

    @property
    def _optimizers(self) -> list[Optimizer]:
        return [step.optimizer for step in self._steps]

    def _norm_of(self, optimizer: Optimizer) -> Norm:
        return gather.gradients(parameters_of(optimizer), self.settings.groups).norm(self.settings.norm_type)

    def _check_unscaled(self, index: int) -> None:
        """Raise an error for gradients of several optimizers that a GradScaler's scale still multiplies."""
        optimizer = self._steps[index].optimizer
        if len(self._steps) > 1 and vars(optimizer).get("grad_scale") is not None:
            raise RuntimeError(
                f"{called(index, optimizer)} steps with gradients that a GradScaler's scale still multiplies; "
                "call `scaler.unscale_(optimizer)` for each optimizer of the Clipper before the first "
                "one steps"
            )


def _row(number: int, gradients: Gradients, decision: Decision, loss: Loss, clipped_norm: Norm | None) -> Row:
    """What is recorded of a clipping."""
    total_norm, whole_norm = gradients.total_norm, gradients.whole_norm
    nonfinite: bool | Tensor | None = None
    if whole_norm is not total_norm:  # gradients of exempt groups count here alone
        nonfinite = (
            ~whole_norm.isfinite() if isinstance(whole_norm, Tensor) else not math.isfinite(whole_norm)
        )
    norm = scalars.present(total_norm)
    return Row(
        number, norm, decision.max_norm, decision.clip_coef, decision.skipped, loss, clipped_norm, nonfinite
    )
