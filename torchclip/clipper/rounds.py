"""Rounds: the optimizers' steps after one backward pass, clipped once and recorded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from threading import RLock, get_ident
from typing import Any, TypeAlias

from torch.optim import Optimizer

from torchclip._core import gather, scalars
from torchclip._core.batch import Norm
from torchclip.clipper import fused
from torchclip.clipper.backward import check_in_backward, graph_task
from torchclip.clipper.clipping import change, decide
from torchclip.clipper.closure import creates_state, with_closure
from torchclip.clipper.loss import PendingLoss
from torchclip.clipper.open_round import OpenRound
from torchclip.clipper.optimizers import parameters_of
from torchclip.clipper.sets import Gradients
from torchclip.clipper.settings import Settings
from torchclip.clipper.skip_above import InARow
from torchclip.clipper.step import Step
from torchclip.clipper.unchanged import check_after_closure, check_unchanged, check_unscaled, has_new, mark
from torchclip.history.history import History

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional arguments of a step, the optimizer first, and its keyword arguments."""


class Rounds:
    """The steps of some optimizers, from their hooks' point of view.

    The first optimizer to step in a round clips the gradients of all of them; the others step with the
    clipped gradients.  The round ends when every optimizer has stepped, when one steps again, or when one
    that has stepped has a new gradient.  A single optimizer has a round for each step.

    In a training step caches are cold, so that each frame and object counts.  What most steps do not need is
    therefore asked where it is called.

    Args:
        steps: the steps of the optimizers.
        settings: what the user asks for.
        lock: held while a round is opened or recorded, so that other threads see it before or after.

    Attributes:
        history: what is recorded.
        loss: the loss of the next round.
        number: the number of the next round, or of the open one.
    """

    def __init__(self, steps: Sequence[Step], settings: Settings, lock: RLock) -> None:
        self.settings, self.history, self.loss = settings, History(), PendingLoss()
        self.number = 0
        self._steps, self._lock, self._several = steps, lock, len(steps) > 1
        self._open: OpenRound | None = None

    def before_step(
        self, step: Step, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        """Clip the gradients now or after a closure; returns other arguments for the step, or None."""
        if step.thread is not None and not step.begins_anew():
            return None
        step.thread, step.is_nested, step.counts = get_ident(), False, True
        try:
            if "found_inf" in vars(optimizer):
                fused.override(step)  # takes note of what a GradScaler has set, as the step may fail
            has_more = len(args) > 1 or bool(kwargs)
            if has_more and creates_state(optimizer, args, kwargs, partial(self._norm_of, optimizer)):
                step.counts = False
                return None
            if self._several and self._goes_on(step):
                self._join(step)
                return with_closure(args, kwargs, partial(self._call_unchanged, step)) if has_more else None
            self._open_round(step)
            if has_more:
                replaced = with_closure(args, kwargs, partial(self._call_and_clip, step))
                if replaced is not None:
                    return replaced
            self._clip(step, optimizer)
            return None
        except BaseException:
            self.loss.value = None
            step.fail()
            raise

    def after_step(self, step: Step, *_: Any) -> None:
        """End a step; a round is in the history, and uses its number, only if a step was taken in it."""
        opened, ends = self._open, False
        if step.thread is None or (step.is_nested and step.is_around(1)):
            return
        if opened is not None and step in opened.before:
            moved = opened.before[step].moved(step, opened.settings.names, self._optimizers)
            opened.moved = opened.moved if moved is None else [*opened.moved, moved]
        with self._lock:
            if opened is not None and step.counts:
                step.stepped = opened.stepped = True
                ends = not self._several or all(each.stepped for each in self._steps)
                if ends:
                    self._record(opened)
                else:
                    step.undo("finished")
                    mark(step)
            if step.undos:
                step.undo("finished")
            step.thread = None
        sizes = self.history._clipped_sizes
        if ends and opened is not None and opened.number >= sizes.next_step and opened.rows:
            sizes.measure(opened.number, self._optimizers)  # for the history's note on stalls

    # The open round

    def close(self) -> None:
        """Record the round that is open, if a step was taken in it.  The caller holds the lock.

        An interrupt may have left a round open that is recorded already.
        """
        opened = self._open
        if opened is None:
            return
        if opened.stepped and not self._is_recorded():
            self._record(opened)
        elif opened.stepped:
            for count in opened.settings.counts:
                count.end()
            self.number = opened.number + 1
        self.forget()

    def _record(self, opened: OpenRound) -> None:
        """Record a round, and end it."""
        if opened.rows:
            self.history._extend(opened.rows_after(self._steps) if opened.by_scaler else opened.rows)
            if opened.layers is not None:
                self.history.layers._in_model_order = opened.settings.names.has_model
                self.history.layers.append(opened.number, *opened.layers, opened.moved)
            for count in opened.settings.counts:
                count.end()
            self.number = opened.number + 1
        self.forget()

    def forget(self) -> None:
        """Discard the open round, if there is one."""
        self._open = None

    def is_running(self) -> bool:
        """Whether any step runs, in any thread; undoes what failed steps have left."""
        running = [step.is_running() for step in self._steps]  # each, as it ends failed steps
        return any(running)

    def is_within(self) -> bool:
        """Whether a round is open and neither recorded nor failed: a state is then that of before it.

        The caller holds the lock.
        """
        opened = self._open
        begun = self.is_running() or (opened is not None and opened.stepped)
        return opened is not None and begun and not self._is_recorded()

    def steps(self) -> int:
        """The number of rounds that are recorded.  The caller holds the lock."""
        opened = self._open
        return opened.number + 1 if opened is not None and self._is_recorded() else self.number

    def skips(self, count: InARow) -> int:
        """How many steps in a row were skipped, of those that are recorded.  The caller holds the lock."""
        return int(count.then if self._is_recorded() else count.count)

    def _is_recorded(self) -> bool:
        """Whether the open round is in the history already."""
        return self._open is not None and self.history._ends_with(self._open.number)

    # Opening a round, or going on with the open one

    def _open_round(self, step: Step) -> None:
        """Begin a round, and end the one before, whose other optimizers did not step."""
        settings, opened = self.settings, OpenRound()
        opened.opener, opened.settings, opened.rows = step, settings, []
        if graph_task() != -1:
            opened.is_local = check_in_backward(self._optimizers, settings)
        if self._open is not None or settings.memories:
            with self._lock:
                if self._open is not None:
                    self.close()
                for memory in settings.memories:
                    memory.begin_step()
        opened.number = self.number
        if self._several:
            for each in self._steps:
                each.stepped = False
            opened.note_scaler(step)
        self._open = opened

    def _goes_on(self, step: Step) -> bool:
        """Whether an optimizer steps with gradients that were clipped in the open round.

        Raises:
            RuntimeError: if its gradients have changed since then.
        """
        opened = self._open
        for other in self._steps:
            if other is not step:
                other.is_running()  # which finds those that have failed
        if opened is None or step.stepped:
            return False
        if not opened.opener.stepped and (opened.opener is step or not opened.opener.is_running()):
            return False  # the step that opened it has failed, so that there is no round
        if any(other.stepped and has_new(other) for other in self._steps):
            return False
        check_unscaled(step)
        check_unchanged(step)
        return True

    def _join(self, step: Step) -> None:
        """Let another optimizer step with the gradients that were clipped for all."""
        opened = self._open
        assert opened is not None
        opened.note_scaler(step)
        if opened.layers is not None:
            opened.copy_weights(step)
        opened.skip(step)

    def _call_and_clip(self, step: Step, closure: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        step.undo("again")
        loss = closure(*args, **kwargs)
        self._clip(step, step.optimizer)
        return loss

    def _call_unchanged(self, step: Step, closure: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        loss = closure(*args, **kwargs)
        check_after_closure(step)
        return loss

    # Clipping

    def _clip(self, step: Step, optimizer: Optimizer) -> None:
        """Measure, decide, change, record and tell."""
        opened = self._open
        assert opened is not None
        settings, number = opened.settings, opened.number
        if self._several:
            check_unscaled(step)
        optimizers = self._optimizers if self._several else [optimizer]
        gradients = Gradients(optimizers, settings, opened.is_local)
        if settings.layers_every and number % settings.layers_every == 0:
            names, _, norms = settings.names.norms(optimizers, settings.norm_type)
            opened.layers = names, norms  # of the last call of a closure
        loss, self.loss.value = self.loss.value, None  # now, as the step may fail
        skipped, max_norm, clip_coef = decide(gradients, settings, optimizer, number, loss)
        opened.skipped, clipped_norm, nonfinite = skipped, None, None
        is_one = clip_coef.__class__ is float and clip_coef == 1.0
        if skipped is not True and (settings.always_changes or not is_one):
            clip_coef, clipped_norm = change(gradients, settings, (skipped, max_norm, clip_coef), step)
        norm = gradients.total_norm
        if gradients.whole_norm is not norm:
            nonfinite = scalars.is_nonfinite(gradients.whole_norm)
        if norm.__class__ is not float or norm < 0:
            norm = scalars.present(norm)
        row = (number, norm, max_norm, clip_coef, skipped, loss, clipped_norm, nonfinite)
        opened.rows.append(row)
        if settings.on_clip is not None:
            opened.tell(settings.on_clip, row, step, gradients)
        if self._several:
            for other in self._steps:
                if other is not step:
                    mark(other)
        if opened.layers is not None:
            opened.copy_weights(step)
        if skipped is not False and (self._several or settings.may_skip):
            opened.skip(step)  # now that they are marked, as another optimizer may share them

    @property
    def _optimizers(self) -> list[Optimizer]:
        return [step.optimizer for step in self._steps]

    def _norm_of(self, optimizer: Optimizer) -> Norm:
        return gather.gradients(parameters_of(optimizer), self.settings.groups).norm(self.settings.norm_type)
