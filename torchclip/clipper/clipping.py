"""One clipping: gradients are measured, judged, reported, measured again if needed, and changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torchclip._core import scalars
from torchclip._core.batch import Facts, Norm, Norms
from torchclip.clipper import fused, nonfinite
from torchclip.clipper.rules import clip_by, tried, write_back
from torchclip.clipper.scope import Snapshot
from torchclip.clipper.settings import Settings
from torchclip.clipper.step import Step
from torchclip.history.records import as_records, with_layers

Loss: TypeAlias = float | Tensor | None
Layers: TypeAlias = tuple[list[str], Norms]


class Row(NamedTuple):
    """The arguments of ``History.append``."""

    step: int
    total_norm: Norm
    max_norm: Norm
    clip_coef: Norm
    skipped: bool | Tensor
    loss: Loss


class Clipping:
    """How the gradients of some optimizers are clipped.

    Args:
        steps: the steps of the optimizers that the gradients are for.
        settings: what the user asks for.

    Attributes:
        hooks: the handles of the pre hooks that clip.
    """

    def __init__(self, steps: Sequence[Step], settings: Settings) -> None:
        self._steps, self._settings = steps, settings
        self.hooks: list[RemovableHandle] = []
        self._overrides: dict[int, fused.GradScaleOverride] = {}
        # For the open round: whether it is skipped, and what fused steps have yet to do.
        self._skipped: bool | Tensor = False
        self._deferred: dict[int, fused.Deferred] = {}

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers, in order."""
        return [step.optimizer for step in self._steps]

    def begin(self, index: int) -> None:
        """Record what a GradScaler has set for the step that begins, as it may end in an exception."""
        if "found_inf" in vars(self._steps[index].optimizer):
            self._override(index)

    def clip(
        self,
        number: int,
        snapshot: Snapshot,
        loss: Loss,
        index: int,
        reports: bool,
        layers: Layers | None = None,
    ) -> Row:
        """Clip gradients that were just measured.

        Args:
            number: the number of the step.
            snapshot: the gradients.
            loss: the loss to record.
            index: the optimizer that is about to step with them.
            reports: whether to call ``on_clip``.
            layers: names and norms of single parameters, for ``on_clip``.

        Returns:
            What to record.
        """
        self.forget()
        settings, rule = self._settings, self._settings.rule
        settings.bank.begin_step(number)
        if settings.spikes is not None:
            settings.spikes.begin(number)
        on_clip = settings.on_clip if reports else None
        runs_user_code = on_clip is not None or settings.asks_user_code
        held = snapshot.held_norms() if runs_user_code else ()
        self._judge(snapshot, index)
        row = _row(number, snapshot, loss)
        trial: Snapshot | None = None
        if on_clip is not None:
            if rule is not None and row.skipped is not True:
                clip_coef, trial = tried(rule, snapshot)
                row = row._replace(clip_coef=clip_coef)
            (record,) = as_records([row])
            on_clip(record if layers is None else with_layers(record, *layers))
        if runs_user_code and row.skipped is not True:
            if not snapshot.facts & Facts.SHARDED:
                snapshot = self._measured_again(snapshot, index)
                row = _row(number, snapshot, loss)
            else:
                snapshot = _same_gradients(snapshot, held)
        if row.skipped is True:
            self._skipped = settings.may_skip
            return row
        return self._apply(snapshot, row, trial, index)

    def _apply(self, snapshot: Snapshot, row: Row, trial: Snapshot | None, index: int) -> Row:
        """Change the gradients as was decided; returns what to record."""
        rule = self._settings.rule
        self._skipped = row.skipped
        self._set_found_inf(index)
        if trial is not None and snapshot.facts & Facts.SHARDED:
            # Other ranks do not run this one's user code: what involves them was done with the copies.
            write_back(snapshot, trial)
            return row
        snapshot.zero_nonfinite_()
        if scalars.may_change(row.clip_coef):
            self._scale(snapshot, index)
        return row if rule is None else row._replace(clip_coef=clip_by(rule, snapshot))

    def _judge(self, snapshot: Snapshot, index: int) -> None:
        """Decide what to do, without changing anything."""
        settings = self._settings
        optimizers = [self._steps[i].optimizer for i in snapshot.optimizers_from(index)]
        snapshot.skipped = nonfinite.skips(settings.nonfinite, snapshot.total_norm, optimizers)
        if snapshot.skipped is True:
            return
        if settings.nonfinite == "error":
            nonfinite.refuse(snapshot, settings.order, settings.names.of_gradients(self.optimizers))
        zeroes = settings.nonfinite == "zero" and nonfinite.mark_nonfinite(snapshot)
        if settings.spikes is not None:
            norm = snapshot.joint_norm() if zeroes else snapshot.total_norm
            spike = settings.spikes.should_skip(nonfinite.deciding_norm(norm, optimizers))
            is_known = spike is True or snapshot.skipped is False
            snapshot.skipped = spike if is_known else snapshot.skipped | spike
            if spike is True:
                return
        snapshot.set_thresholds()
        if settings.spikes is not None:
            snapshot.limit_all(settings.spikes.clip_coef, settings.spikes.max_norm)

    def _measured_again(self, first: Snapshot, index: int) -> Snapshot:
        """The gradients after user code ran, with the thresholds that were decided before.

        User code may have replaced a gradient, changed it in place, or set one for a parameter that had none.
        """
        bank = self._settings.bank
        while True:
            asked = bank.asked
            snapshot = first.again()
            snapshot.measure()
            self._judge(snapshot, index)
            if not (bank.runs_user_code and bank.asked > asked):
                return snapshot
            # The threshold of what was not there before was learned by the user's own code.
            bank.close()

    # Changing

    def hide(self, index: int) -> bool:
        """Hide the gradients from an optimizer's step if the round is skipped; returns whether it is."""
        if self._skipped is True:
            self._steps[index].undo_at_end(nonfinite.hide_gradients(self._steps[index].optimizer))
        return self._skipped is True

    def join(self, index: int) -> None:
        """Let another optimizer step with the gradients that were clipped for all."""
        if self.hide(index):
            return
        by_scaler = nonfinite.is_skipped_by_scaler(self._steps[index].optimizer)
        self._set_found_inf(index)
        deferred = self._deferred.get(index)
        if deferred is not None and by_scaler is True:
            deferred.apply()  # as the step does not
        elif deferred is not None:
            self._override(index).set(deferred.divisor)
            self._steps[index].undo_at_end(deferred.end)

    def end(self) -> None:
        """Multiply the gradients with which an optimizer did not step in this round."""
        for deferred in self._deferred.values():
            deferred.apply()
        self.forget()

    def forget(self) -> None:
        """Multiply nothing more in the open round."""
        for deferred in self._deferred.values():
            deferred.forget()
        self._skipped, self._deferred = False, {}

    def _override(self, index: int) -> fused.GradScaleOverride:
        """The ``grad_scale`` of an optimizer, until its step is over."""
        override = self._overrides.get(index)
        if override is None or override.is_over:
            override = self._overrides[index] = fused.GradScaleOverride(self._steps[index].optimizer)
            self._steps[index].undo_at_end(override.restore)
        return override

    def _set_found_inf(self, index: int) -> None:
        """Make a fused step skip itself, as hiding the gradients would wait for the device."""
        if not isinstance(self._skipped, bool) and self._settings.may_skip:
            # A GradScaler may have its own reason to skip this optimizer's step.
            by_scaler = nonfinite.is_skipped_by_scaler(self._steps[index].optimizer)
            self._override(index).skip_where(self._skipped | by_scaler)

    def _scale(self, snapshot: Snapshot, index: int) -> None:
        """Multiply the gradients: now, or during the fused steps, as their ``grad_scale``."""
        if self._settings.rule is not None:  # which clips them in place, too
            snapshot.scale_()
            return
        optimizers = snapshot.optimizers_from(index)
        fused_ones = [
            i
            for i in optimizers
            if fused.can_scale(self._steps[i].optimizer, self.hooks[i], snapshot, is_later=i != index)
            and nonfinite.is_skipped_by_scaler(self._steps[i].optimizer) is not True
        ]
        first = snapshot.sets[0]
        divisor = fused.divisor(first.clip_coefs[0], snapshot.grad_scale) if fused_ones else None
        alone = divisor is not None and len(optimizers) == 1
        if not isinstance(snapshot.skipped, bool) and not alone:
            snapshot.keep_if_skipped()
        if divisor is None:
            snapshot.scale_()
            return
        if len(fused_ones) < len(optimizers):
            snapshot.scale_but_(fused_ones)
        for i in fused_ones:
            if i == index:
                self._override(i).set(divisor)
            else:
                step = self._steps[i]
                self._deferred[i] = fused.Deferred(step.optimizer, step.member, first.clip_coefs[0], divisor)


def _row(number: int, snapshot: Snapshot, loss: Loss) -> Row:
    norm, skipped = scalars.present(snapshot.total_norm), snapshot.skipped
    if skipped is True:
        return Row(number, norm, math.inf, 1.0, True, loss)
    return Row(number, norm, snapshot.max_norm(), snapshot.clip_coef(), skipped, loss)


def _same_gradients(first: Snapshot, held: Sequence[Sequence[float]]) -> Snapshot:
    """The gradients after user code ran, which must not have changed sharded ones.

    Another rank may not run any user code, so measuring again could wait for it forever.

    Args:
        first: the gradients before.
        held: the norms of this rank's parts of them.
    """
    snapshot = first.again()
    same_names = [each.names() for each in first.sets] == [each.names() for each in snapshot.sets]
    # As texts, because NaN equals NaN.
    if not same_names or repr(held) != repr(snapshot.held_norms()):
        raise RuntimeError(
            "gradients were changed by `on_clip` or by the object that gives `max_norm`, but all ranks "
            "know their norm by now, and this one cannot measure it again alone; change sharded "
            "gradients before optimizer.step() or in a hook registered before the Clipper. The step was "
            "called off"
        )
    snapshot.take_decisions_of(first)
    return snapshot
