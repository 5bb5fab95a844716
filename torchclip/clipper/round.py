"""Rounds: the optimizers' steps after one backward pass, clipped once and recorded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import and_
from typing import Any

import torch
from torch import Tensor

from torchclip._core import gather, scalars
from torchclip._core.batch import Norm, Norms
from torchclip.clipper import backward
from torchclip.clipper.clipping import Clipping, Loss, Row
from torchclip.clipper.nonfinite import is_skipped_by_scaler
from torchclip.clipper.scope import Snapshot
from torchclip.clipper.settings import Settings
from torchclip.clipper.step import State, Step, creates_state, with_closure
from torchclip.history.history import History
from torchclip.history.records import as_records, with_layers


class _OpenRound:
    """What will be recorded of the open round, unless the kernel has clipped it.

    Attributes:
        in_backward: the backward pass during which its steps are taken; None if there is none.
        rows: a row for each clipping: each call of a closure, and each optimizer in a backward pass.
        layers: names and norms of single parameters: those of each optimizer in a backward pass.
        skips: with several optimizers: whether a GradScaler skips the step of each that has begun one.
    """

    def __init__(self) -> None:
        self.in_backward: backward.BackwardRound | None = None
        self.rows: list[Row] = []
        self.layers: list[tuple[list[str], Norms]] = []
        self.skips: dict[int, bool | Tensor] = {}


class Round:
    """The steps of some optimizers, from their hooks' point of view.

    The first optimizer to step in a round clips the gradients of all of them; the others step with the
    clipped gradients.  The round ends when every optimizer has stepped, when one steps again, or when one
    that has stepped has a new gradient.

    Steps during a backward pass are clipped one by one, and recorded together when the pass is over.

    Args:
        state: the state of the hooks, including the kernel's.
        steps: the steps of the optimizers.
        clipping: how gradients are clipped.
        settings: what the user asks for.
    """

    def __init__(self, state: State, steps: Sequence[Step], clipping: Clipping, settings: Settings) -> None:
        self.history = History()
        self._state, self._steps, self._clipping, self._settings = state, steps, clipping, settings
        self._open = _OpenRound()

    def before_step(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Clip the gradients now or after a closure; returns other arguments for the step, or None."""
        step = self._steps[index]
        if not step.begin():
            return None
        try:
            self._clipping.begin(index)
            self._find_failed(index)
            return self._begin(index, args, kwargs)
        except BaseException:
            self._state.loss = None
            step.fail()
            raise

    def after_step(self, index: int) -> None:
        """End a step; a round is in the history, and uses its number, only if a step was taken in it."""
        step = self._steps[index]
        if not step.end() or not self._state.open:
            return
        step.member.stepped = True
        if self._open.in_backward is not None:  # whose end is the round's
            return
        if all(each.member.stepped or each.is_gone() for each in self._steps):
            number = self._state.number
            self.close()
            if number >= self._state.next_sample:
                self._measure_clipped(number)
        else:
            step.member.mark(False)

    def _measure_clipped(self, number: int) -> None:
        """Measure the gradients of a round that has just ended, for the history's note on stalls."""
        sizes = self.history._clipped_sizes
        if number >= sizes.next_step:
            sizes.measure(number, self._clipping.optimizers)
        self._state.next_sample = sizes.next_step

    def is_running(self) -> bool:
        """Whether the caller is called from within a step."""
        running = [step.is_running() for step in self._steps]  # each, as it ends failed steps
        return any(running)

    def is_open(self) -> bool:
        """Whether some of several optimizers have yet to step in a round that has not failed."""
        self.close_after_backward()
        running = self.is_running()
        begun = running or any(member.stepped for member in self._state.members)
        return self._settings.several and self._state.open and begun

    def close(self) -> None:
        """Record the round that is open, if there is one."""
        state = self._state
        if not state.open:
            return
        # If no optimizer has stepped, the first one has failed.
        stepped = [i for i, member in enumerate(state.members) if member.stepped]
        ended, rows = self._open, self._open.rows
        self._discard()
        if ended.in_backward is not None:
            rows = ended.in_backward.joined(rows)
        if stepped and state.went_short:
            state.record()
        elif stepped and rows:
            self._clipping.end()
            skips = [ended.skips[i] for i in stepped if i in ended.skips]
            if skips:
                rows = [*rows[:-1], _skipped_too(rows[-1], reduce(and_, skips))]
            self._record(rows, ended.layers, reports=ended.in_backward is not None)

    def close_after_backward(self) -> None:
        """Close a round after its backward pass, if all its steps were taken within checkpoints."""
        if self._open.in_backward is not None and not backward.is_running():
            self.close()

    def forget(self) -> None:
        """Discard the open round and its data, as a state was loaded."""
        self._discard()
        self._clipping.forget()

    def _discard(self) -> None:
        if self._open.in_backward is not None:
            self._open.in_backward.stop()
        self._open = _OpenRound()
        self._state.open = False
        for member in self._state.members:
            member.stepped = False

    def _take_loss(self) -> Loss:
        """The loss of the new round."""
        loss, self._state.loss = self._state.loss, None
        return loss

    def _record(self, rows: Sequence[Row], layers: Sequence[tuple[list[str], Norms]], reports: bool) -> None:
        for row in rows:
            self.history.append(*row)
        if self._settings.spikes is not None:
            self._settings.spikes.end()
        if layers:
            names = [name for each, _ in layers for name in each]
            norms = scalars.concatenate([each for _, each in layers])
            self.history.layers.append(self._state.number, names, norms)
        self._state.number += 1
        if reports and self._settings.on_clip is not None:
            record = as_records(rows)[0]
            self._settings.on_clip(with_layers(record, names, norms) if layers else record)

    # Before a step

    def _find_failed(self, index: int) -> None:
        """End the steps that have failed, and the round if the step that opened it is among them."""
        state = self._state
        for step in self._steps:
            if step is not self._steps[index]:
                step.is_running()
        opener = state.members[state.opener]
        failed = state.open and not opener.stepped and (state.opener == index or not opener.running)
        if failed and self._open.in_backward is None:
            self.close()

    def _begin(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step, state = self._steps[index], self._state
        if creates_state(step.optimizer, args, kwargs, lambda: self._own_norm(index)):
            step.counts = False
            return None
        in_backward = backward.is_running()
        opened = self._open
        if state.open and in_backward == (opened.in_backward is not None) and self._goes_on(index):
            if opened.in_backward is not None:
                opened.in_backward.follow(self.close)
                self._clip(index)
            else:
                opened.skips[index] = is_skipped_by_scaler(step.optimizer)
                self._clipping.join(index)
            return self._with_closure(index, args, kwargs, self._call_unchanged)
        is_sharded = in_backward and backward.refuse(self._settings, self._clipping.optimizers)
        self.close()
        self._open = _OpenRound()  # a step whose closure has ended its round leaves rows there
        state.went_short, state.open, state.opener = False, True, index
        if self._settings.several:
            for bank in self._settings.banks:
                bank.begin_round()
            if in_backward:
                self._open.in_backward = backward.BackwardRound(self._settings, is_sharded)
                self._open.in_backward.follow(self.close)
            else:
                self._open.skips[index] = is_skipped_by_scaler(step.optimizer)
        replaced = self._with_closure(index, args, kwargs, self._call_and_clip)
        if replaced is None:
            self._clip(index)
        return replaced

    def _with_closure(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], around: Callable[..., Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments of a step with a function around its closure; None if it has none."""
        if len(args) == 1 and not kwargs:
            return None
        step = type(self._steps[index].optimizer).step
        return with_closure(step, args, kwargs, partial(around, index))

    def _own_norm(self, index: int) -> Norm:
        snapshot = Snapshot(self._clipping.optimizers, self._settings, index)
        snapshot.measure()
        return snapshot.total_norm

    def _call_and_clip(self, index: int, closure: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self._steps[index].undo("again")
        loss = closure(*args, **kwargs)
        self._clip(index)
        return loss

    def _call_unchanged(self, index: int, closure: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a closure that must not change the gradients, such as those that frameworks pass on."""
        loss = closure(*args, **kwargs)
        if nonzero(self._state.members[index].changed()):
            raise RuntimeError(
                f"the closure of {self._called(index)} computed new gradients, but those of this round "
                "were clipped when another optimizer of the Clipper stepped; only the first one to step "
                "may take a closure"
            )
        return loss

    def _clip(self, index: int) -> None:
        """Clip the current gradients; in a backward pass those of one optimizer."""
        optimizers, settings, number = self._clipping.optimizers, self._settings, self._state.number
        opened = self._open  # user code may step, and so open another round
        in_backward = opened.in_backward
        if in_backward is not None and in_backward.is_sharded:
            opened.rows.append(in_backward.clip_sharded(optimizers[index], number, self._take_loss()))
            return
        only = None if in_backward is None else index
        snapshot = Snapshot(optimizers, settings, only)
        self._refuse_scaled(index)
        snapshot.measure()
        layers = None
        if settings.layers_every and number % settings.layers_every == 0:
            names, _, norms = settings.names.norms(optimizers, settings.order, only)
            if only is None:
                opened.layers.clear()  # a closure may be called several times
            layers = (names, norms)
            opened.layers.append(layers)
        row = self._clipping.clip(
            number, snapshot, self._take_loss(), index, reports=in_backward is None, layers=layers
        )
        opened.rows.append(row)
        if settings.several and in_backward is None:
            for i, step in enumerate(self._steps):
                if i != index:
                    step.member.mark(True)
        self._clipping.hide(index)  # now that they are marked, as another optimizer may share them

    def _refuse_scaled(self, index: int) -> None:
        """Refuse gradients that are still multiplied by a GradScaler's scale, with several optimizers."""
        if self._settings.several and getattr(self._steps[index].optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                f"{self._called(index)} steps with gradients that are still multiplied by a GradScaler's "
                "scale; call `scaler.unscale_(optimizer)` for each optimizer of the Clipper before the first "
                "one steps"
            )

    # The open round

    def _goes_on(self, index: int) -> bool:
        """Whether an optimizer steps with gradients that were clipped in this round.

        Raises:
            RuntimeError: if its gradients have changed since then.
        """
        member = self._state.members[index]
        if self._open.in_backward is not None:
            return not member.stepped and not self._open.in_backward.is_over()
        if member.stepped:
            return False
        if any(other.stepped and nonzero(other.changed()) for other in self._state.members):
            return False
        self._refuse_scaled(index)
        if nonzero(member.changed()):
            raise RuntimeError(
                f"the gradients of {self._called(index)} have changed since they were clipped, before its "
                "step; with a GradScaler call `scaler.unscale_(optimizer)` for each optimizer of the "
                "Clipper before the first one steps; optimizers that step after backward passes of their "
                "own, as in a GAN, need a Clipper each. This step was called off"
            )
        return True

    def _called(self, index: int) -> str:
        """The name of an optimizer in an error."""
        return f"optimizer {index} ({type(self._steps[index].optimizer).__name__})"


def _skipped_too(row: Row, skipped: bool | Tensor) -> Row:
    """The record of a round, given whether a GradScaler has skipped all its steps."""
    if isinstance(skipped, bool):
        return row._replace(max_norm=math.inf, clip_coef=1.0, skipped=True) if skipped else row
    return row._replace(skipped=torch.as_tensor(row.skipped, device=skipped.device) | skipped)


def nonzero(grads: Sequence[Tensor]) -> bool:
    """Whether any gradient is not 0, which optimizers' ``zero_grad`` may leave."""
    return bool(grads) and not float(gather.tensors(grads).norm(float("inf"))) <= 0
