"""Rounds: the optimizers' steps after one backward pass, clipped once and recorded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import and_
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchclip._core import gather, joint_norms, mesh, scalars
from torchclip._core.batch import Norm, Norms
from torchclip.clipper.backward import Passes, is_running
from torchclip.clipper.clipping import Clipping, Row
from torchclip.clipper.held import HeldNorms
from torchclip.clipper.names import Names
from torchclip.clipper.nonfinite import is_skipped_by_scaler
from torchclip.clipper.rules import ratio
from torchclip.clipper.step import State, Step, creates_state, with_closure
from torchclip.history.history import History
from torchclip.history.records import Record, as_records

Around: TypeAlias = Callable[[int, Callable[..., Any]], Callable[..., Any]]


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
        names: the names of the parameters.
        layers: how often, in rounds, the norms of single parameters are recorded; 0 for never.
        order: the order of the norms.
        needs_all: the option that needs the gradients of all optimizers at once; None if there is none.
        on_clip: the function to call for a round that was clipped during a backward pass.
    """

    def __init__(
        self,
        state: State,
        steps: Sequence[Step],
        clipping: Clipping,
        names: Names,
        layers: int,
        order: float,
        needs_all: Callable[[Sequence[Optimizer]], str | None],
        on_clip: Callable[[Record], object] | None,
    ) -> None:
        self.history = History()
        self._state, self._steps, self._clipping, self._names = state, steps, clipping, names
        self._layers_every, self._order = layers, order
        self._needs_all, self._on_clip = needs_all, on_clip
        # The record of the open round, unless the kernel has it.
        self._rows: list[Row] = []
        self._layers: list[tuple[list[str], Norms]] = []
        # With several optimizers: whether a GradScaler skips the step of each that has begun one.
        self._skips: dict[int, bool | Tensor] = {}
        self._in_backward = False
        self._passes = Passes()
        self._held: HeldNorms | None = None
        self._joint: tuple[Norm, Norm] | None = None  # of what was held, once the backward pass is over

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
        if not step.end() or not step.counts or not self._state.open:
            return
        step.member.stepped = True
        if self._in_backward:  # its end is the round's
            return
        if all(member.stepped for member in self._state.members):
            number = self._state.number
            self.close()
            if number >= self._state.next_sample:
                self._measure_clipped(number)
        else:
            step.member.mark(False)

    def _measure_clipped(self, number: int) -> None:
        """Measure the gradients of a round that has just ended, for the history's note on stalls."""
        sizes = self.history.clipped_sizes
        if number >= sizes.next_step:
            sizes.measure(number, [step.optimizer for step in self._steps])
        self._state.next_sample = sizes.next_step

    def is_running(self) -> bool:
        """Whether the caller is called from within a step."""
        running = [step.is_running() for step in self._steps]  # each, as it ends failed steps
        return any(running)

    def is_open(self) -> bool:
        """Whether some of several optimizers have yet to step in a round that has not failed."""
        running = self.is_running()
        begun = running or any(member.stepped for member in self._state.members)
        return len(self._steps) > 1 and self._state.open and begun

    def close(self) -> None:
        """Record the round that is open, if there is one."""
        state = self._state
        if not state.open:
            return
        # If no optimizer has stepped, the first one has failed.
        taken = any(member.stepped for member in state.members)
        in_backward, self._in_backward, state.open = self._in_backward, False, False
        self._passes.end()
        held, self._held = self._held, None
        joint, self._joint = self._joint, None
        rows, self._rows = self._rows, []
        layers, self._layers = self._layers, []
        skips = [
            self._skips[i] for i, member in enumerate(state.members) if member.stepped and i in self._skips
        ]
        self._skips = {}
        if taken and state.went_short:
            state.record()
        elif taken and rows and (held is None or joint is not None):
            self._clipping.end()
            if joint is not None:
                rows = [self._joined(rows)._replace(total_norm=joint[0], clip_coef=joint[1])]
            elif in_backward:
                rows = [self._joined(rows)]
            elif skips:
                rows = [*rows[:-1], _skipped_too(rows[-1], reduce(and_, skips))]
            self._record(rows, layers, tell=in_backward)
        for member in state.members:
            member.stepped = False

    def close_after_backward(self) -> None:
        """Close a round after its backward pass, if all its steps were taken within checkpoints."""
        if self._in_backward and not is_running():
            self.close()

    def forget(self) -> None:
        """Discard the open round and its data, as a state was loaded."""
        self._state.open = self._in_backward = False
        for member in self._state.members:
            member.stepped = False
        self._rows, self._layers, self._skips = [], [], {}
        self._clipping.forget()

    def take_loss(self) -> float | Tensor | None:
        """The loss of the new round."""
        loss, self._state.loss = self._state.loss, None
        return loss

    def _record(self, rows: Sequence[Row], layers: Sequence[tuple[list[str], Norms]], tell: bool) -> None:
        for row in rows:
            self.history.append(*row)
        if self._clipping.spikes is not None:
            self._clipping.spikes.end()
        if layers:
            names = [name for each, _ in layers for name in each]
            norms = scalars.concatenate([each for _, each in layers])
            self.history.layers.append(self._state.number, names, norms)
        self._state.number += 1
        if tell and self._on_clip is not None:
            self._on_clip(as_records(rows)[0])

    # Before a step

    def _find_failed(self, index: int) -> None:
        """End the steps that have failed, and the round if the step that opened it is among them."""
        state = self._state
        for step in self._steps:
            if step is not self._steps[index]:
                step.is_running()
        opener = state.members[state.opener]
        failed = state.open and not opener.stepped and (state.opener == index or not opener.running)
        if failed and not self._in_backward:
            self.close()

    def _begin(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step, state = self._steps[index], self._state
        if creates_state(step.optimizer, args, kwargs, lambda: self._own_norm(index)):
            step.counts = False
            return None
        in_backward = is_running()
        is_sharded = in_backward and self._refuse_in_backward()
        if state.open and in_backward == self._in_backward and self._goes_on(index):
            if in_backward:
                self._passes.follow(self._end_backward)
                self._clip(index)
            else:
                self._skips[index] = is_skipped_by_scaler(step.optimizer)
                self._clipping.join(index)
            return self._with_closure(index, args, kwargs, self._unchanged_by)
        self.close()
        state.went_short, state.open, state.opener = False, True, index
        self._in_backward = in_backward and len(self._steps) > 1
        self._rows, self._layers = [], []
        if len(self._steps) > 1:
            self._clipping.begin_round()
        if self._in_backward:
            self._passes.follow(self._end_backward)
            self._held = HeldNorms(self._order) if is_sharded else None
        elif len(self._steps) > 1:
            self._skips = {index: is_skipped_by_scaler(step.optimizer)}
        replaced = self._with_closure(index, args, kwargs, self._clipped_after)
        if replaced is None:
            self._clip(index)
        return replaced

    def _with_closure(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], around: Around
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments of a step with its closure wrapped; None if it has none."""
        if len(args) == 1 and not kwargs:
            return None
        step = type(self._steps[index].optimizer).step
        return with_closure(step, args, kwargs, partial(around, index))

    def _own_norm(self, index: int) -> Norm:
        snapshot = self._clipping.snapshot(only=index)
        snapshot.measure()
        return snapshot.total_norm

    def _clipped_after(self, index: int, closure: Callable[..., Any]) -> Callable[..., Any]:
        def closure_then_clip(*args: Any, **kwargs: Any) -> Any:
            self._steps[index].undo("again")
            loss = closure(*args, **kwargs)
            self._clip(index)
            return loss

        return closure_then_clip

    def _unchanged_by(self, index: int, closure: Callable[..., Any]) -> Callable[..., Any]:
        """A closure that must not change the gradients, such as those that frameworks pass on."""

        def closure_then_look(*args: Any, **kwargs: Any) -> Any:
            loss = closure(*args, **kwargs)
            if _nonzero(self._state.members[index].changed()):
                raise RuntimeError(
                    f"the closure of {self._called(index)} computed new gradients, but those of this round "
                    "were clipped when another optimizer of the Clipper stepped; only the first one to step "
                    "may take a closure"
                )
            return loss

        return closure_then_look

    def _end_backward(self) -> None:
        """Record the steps of a backward pass, now that other ranks may be asked."""
        if self._held is not None:
            self._joint = self._held.join()
        self.close()

    def _clip(self, index: int) -> None:
        """Clip the current gradients; in a backward pass those of one optimizer."""
        if self._held is not None:
            self._held.clip(self._steps[index].optimizer, self._clipping.way)
            self._rows.append(Row(self._state.number, 0.0, math.inf, 1.0, False, self.take_loss()))
            return
        only = index if self._in_backward else None
        snapshot = self._clipping.snapshot(only=only)
        self._refuse_scaled(index)
        snapshot.measure()
        if self._layers_every and self._state.number % self._layers_every == 0:
            names, _, norms = self._names.norms([step.optimizer for step in self._steps], self._order, only)
            self._layers = [*self._layers, (names, norms)] if self._in_backward else [(names, norms)]
        loss = self.take_loss()
        self._rows.append(
            self._clipping.clip(self._state.number, snapshot, loss, index, tell=not self._in_backward)
        )
        if len(self._steps) > 1 and not self._in_backward:
            for i, step in enumerate(self._steps):
                if i != index:
                    step.member.mark(True)
        self._clipping.hide(index)  # now that they are marked, as another optimizer may share them

    def _refuse_scaled(self, index: int) -> None:
        """Refuse gradients that are still multiplied by a GradScaler's scale, with several optimizers."""
        if len(self._steps) > 1 and getattr(self._steps[index].optimizer, "grad_scale", None) is not None:
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
        if member.stepped or self._in_backward:
            return not member.stepped and not self._passes.are_over()
        if any(other.stepped and _nonzero(other.changed()) for other in self._state.members):
            return False
        self._refuse_scaled(index)
        if _nonzero(member.changed()):
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

    # During a backward pass

    def _refuse_in_backward(self) -> bool:
        """Raise an error for what is impossible while other gradients do not exist yet.

        Returns:
            Whether gradients are sharded.
        """
        parameters = [
            p for step in self._steps for group in step.optimizer.param_groups for p in group["params"]
        ]
        is_sharded = mesh.any_dtensor(parameters)
        takes_no_norm = len(self._steps) > 1 and self._order > 0 and not self._layers_every
        if is_sharded and not (takes_no_norm and self._clipping.takes_no_norm()):
            raise RuntimeError(
                "the gradients of a step that is taken during the backward pass are sharded; their norm "
                "takes other ranks, which may be elsewhere in theirs. Use `Value`, which takes no norm, or "
                "`max_norm=inf`, with nonfinite='propagate', several optimizers and no `layers_every`; or "
                "call optimizer.step() after backward()"
            )
        what = self._needs_all([step.optimizer for step in self._steps]) if len(self._steps) > 1 else None
        if what is not None:
            raise RuntimeError(
                f"an optimizer steps during the backward pass, but {what} needs the gradients of all "
                "optimizers, which are not there yet. Use `scope='group'` or 'parameter' without "
                "`skip_above`, or call optimizer.step() after backward()"
            )
        return is_sharded

    def _joined(self, rows: Sequence[Row]) -> Row:
        """One record for the optimizers that have stepped during a backward pass."""
        norms = [row.total_norm for row in rows]
        losses = [row.loss for row in rows if row.loss is not None]
        total_norm = joint_norms.join(norms, self._order)
        clip_coef = joint_norms.join([row.clip_coef for row in rows], -torch.inf)
        if self._clipping.way is not None:
            after = [row.total_norm * row.clip_coef for row in rows]
            clip_coef = ratio(joint_norms.join(after, self._order), total_norm)
        return Row(
            rows[0].step,
            total_norm,
            joint_norms.join([row.max_norm for row in rows], -torch.inf),
            clip_coef,
            reduce(and_, (row.skipped for row in rows)),
            losses[0] if losses else None,
        )


def _skipped_too(row: Row, skipped: bool | Tensor) -> Row:
    """The record of a round, given whether a GradScaler has skipped all its steps."""
    if isinstance(skipped, bool):
        return row._replace(max_norm=math.inf, clip_coef=1.0, skipped=True) if skipped else row
    return row._replace(skipped=torch.as_tensor(row.skipped, device=skipped.device) | skipped)


def _nonzero(grads: Sequence[Tensor]) -> bool:
    """Whether any gradient is not 0, which optimizers' ``zero_grad`` may leave."""
    return bool(grads) and not float(gather.tensors(grads).norm(float("inf"))) <= 0
