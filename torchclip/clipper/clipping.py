"""One clipping: gradients are measured, judged, reported, measured again if needed, and changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from torchclip._core import gather, scalars
from torchclip._core.batch import Facts, Norm
from torchclip._core.collectives import Kind
from torchclip.clipper import fused, nonfinite
from torchclip.clipper.deferred import Deferred, can_be_deferred
from torchclip.clipper.names import Names
from torchclip.clipper.nonfinite import Nonfinite
from torchclip.clipper.rules import copied_gradients, ratio, write_back
from torchclip.clipper.scope import ClipSet, OwnMaxNorms, Scoping, Snapshot, groups_of, own_max_norms
from torchclip.clipper.spikes import Spikes
from torchclip.clipper.step import Outcome, Step
from torchclip.history.records import Record, as_records
from torchclip.thresholds.bank import ThresholdBank
from torchclip.thresholds.base import Rule

Loss: TypeAlias = float | Tensor | None


class Row(NamedTuple):
    """The arguments of ``History.append``."""

    step: int
    total_norm: Norm
    max_norm: Norm
    clip_coef: Norm
    skipped: bool | Tensor
    loss: float | Tensor | None


class Clipping:
    """How the gradients of some optimizers are clipped.

    Args:
        steps: the steps of the optimizers that the gradients are for.
        rule: the thresholds.
        scoping: which gradients are clipped together.
        policy: what to do about a norm that is not finite.
        spikes: which steps are skipped because their norm is too large; None for none.
        way: the rule for gradients that are not clipped to a norm; None if all are.
        on_clip: the function to call before anything changes.
        names: the names of the parameters.

    Attributes:
        hooks: the handles of the pre hooks that clip.
        not_fused: why the latest clip coefficient below 1 was not passed to a fused step.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        rule: ThresholdBank,
        scoping: Scoping,
        policy: Nonfinite,
        spikes: Spikes | None,
        way: Rule | None,
        on_clip: Callable[[Record], object] | None,
        names: Names,
    ) -> None:
        self._steps, self._rule, self._scoping, self._policy = steps, rule, scoping, policy
        self.spikes, self.way = spikes, way
        self._on_clip, self._names = on_clip, names
        self.hooks: list[RemovableHandle] = []
        self.not_fused: str | None = None
        self._overrides: dict[int, fused.GradScaleOverride] = {}
        # For the open round: whether it is skipped, and what fused steps have yet to do.
        self._skipped: bool | Tensor = False
        self._deferred: dict[int, Deferred] = {}

    def begin(self, index: int) -> None:
        """Record what a GradScaler has set for the step that begins, as it may end in an exception."""
        if "found_inf" in vars(self._steps[index].optimizer):
            self._override(index)

    def begin_round(self) -> None:
        """Have thresholds note what they have learned up to a round of several optimizers."""
        self._rule.begin_round()
        if self.spikes is not None:
            self.spikes.rule.begin_round()

    def takes_no_norm(self) -> bool:
        """Whether gradients are clipped without a norm of them, which only the record has then."""
        optimizers = [step.optimizer for step in self._steps]
        limits = {*own_max_norms(groups_of(optimizers), {}).values()}
        if self._policy != "propagate" or self.spikes is not None or limits - {None, math.inf}:
            return False
        if self.way is not None:
            return getattr(self.way, "by_element", False)
        return None not in limits or self._rule.number == math.inf

    def snapshot(self, own: OwnMaxNorms = MappingProxyType({}), only: int | None = None) -> Snapshot:
        """The current gradients, not measured yet: of all optimizers, or only of one."""
        optimizers = [step.optimizer for step in self._steps]
        groups = groups_of(optimizers)
        if only is not None:
            groups = [group for group in groups if group.optimizer == only]
        grad_scale = getattr(optimizers[0], "grad_scale", None) if len(optimizers) == 1 else None
        names = self._names.of_sets(groups) if self._scoping.scope == "parameter" else {}
        try:
            own = own_max_norms(groups, own)
        except (TypeError, ValueError):
            kind = Kind.CLIP_EACH if self._scoping.scope == "parameter" else Kind.CLIP
            gather.tell_ranks([group.parameters for group in groups], self._scoping.groups, kind)
            raise
        return Snapshot(groups, self._scoping, own, grad_scale, names)

    def clip(self, number: int, snapshot: Snapshot, loss: Loss, index: int, tell: bool) -> Row:
        """Clip gradients that were just measured.

        Args:
            number: the number of the step.
            snapshot: the gradients.
            loss: the loss to record.
            index: the optimizer that is about to step with them.
            tell: whether to call ``on_clip``.

        Returns:
            What to record.
        """
        self.forget()
        self._rule.begin_step(number)
        asks_user = self._rule.runs_user_code
        if self.spikes is not None:
            self.spikes.begin(number)
            asks_user = asks_user or self.spikes.rule.runs_user_code
        on_clip = self._on_clip if tell else None
        user_code = on_clip is not None or asks_user
        held = snapshot.held_norms() if user_code else ()
        skipped, to_zero = self._judge(snapshot, index)
        row = _row(number, snapshot, skipped, loss)
        if self.way is not None and skipped is not True:
            return self._clip_in_its_way(self.way, row, snapshot, to_zero, held, index, on_clip)
        if on_clip is not None:
            (record,) = as_records([row])
            on_clip(record)
        if user_code and skipped is not True:
            if snapshot.facts & Facts.SHARDED:
                snapshot, to_zero = self._same_gradients(snapshot, held, to_zero)
            else:
                snapshot, skipped, to_zero = self._measure_again(snapshot, index)
                row = _row(number, snapshot, skipped, loss)
        self._apply(snapshot, row, to_zero, index)
        return row

    def _clip_in_its_way(
        self,
        way: Rule,
        row: Row,
        snapshot: Snapshot,
        to_zero: Sequence[ClipSet],
        held: Sequence[Sequence[float]],
        index: int,
        on_clip: Callable[[Record], object] | None,
    ) -> Row:
        """Clip by another rule than a norm; the factor for the norm is known only afterwards."""
        only = self._only(snapshot, index)
        if on_clip is None:
            self._apply(snapshot, row, to_zero, index)
            return row._replace(clip_coef=self._apply_way(way, snapshot, only))
        # ``on_clip`` gets the result of clipping copies.
        parameters = [p for clip_set in snapshot.sets for p in clip_set.parameters]
        with copied_gradients(parameters) as copies:
            trial = self.snapshot(snapshot.own, only)
            trial.take_decisions_of(snapshot)
            for clip_set in to_zero:
                trial.sets[snapshot.sets.index(clip_set)].batch.zero_nonfinite_()
            trial.scale_()
            row = row._replace(clip_coef=self._apply_way(way, trial, only))
        (record,) = as_records([row])
        on_clip(record)
        if not snapshot.facts & Facts.SHARDED:
            snapshot, skipped, to_zero = self._measure_again(snapshot, index)
            row = _row(row.step, snapshot, skipped, row.loss)
            self._apply(snapshot, row, to_zero, index)
            return row if skipped is True else row._replace(clip_coef=self._apply_way(way, snapshot, only))
        # Other ranks do not run this one's user code: everything that involves them was done with the copies.
        before = [grad for clip_set in snapshot.sets for grad in clip_set.batch.all]
        now, _ = self._same_gradients(snapshot, held, to_zero)
        self._tell(row.skipped, index)
        write_back(
            [grad for clip_set in now.sets for grad in clip_set.batch.all],
            [copies[id(grad)] for grad in before],
        )
        return row

    def _apply_way(self, way: Rule, snapshot: Snapshot, only: int | None) -> Norm:
        """Clip by another rule than a norm; returns the factor for the norm."""
        before = snapshot.total_norm
        parameters = [p for clip_set in snapshot.sets if clip_set.own is None for p in clip_set.parameters]
        way.clip_(parameters, snapshot.grad_scale)
        clipped = self.snapshot(snapshot.own, only)
        clipped.measure()
        return ratio(clipped.total_norm, before)

    def _only(self, snapshot: Snapshot, index: int) -> int | None:
        """The only optimizer whose gradients these are; None if they are those of all."""
        return None if len(snapshot.others(index)) == len(self._steps) - 1 else index

    def _judge(self, snapshot: Snapshot, index: int) -> tuple[bool | Tensor, Sequence[ClipSet]]:
        """Decide what to do, without changing anything.

        Returns:
            Whether the step is skipped, and the sets whose non-finite elements are to be set to 0.
        """
        optimizers = [self._steps[i].optimizer for i in (index, *snapshot.others(index))]
        skipped = nonfinite.skips(self._policy, snapshot.total_norm, optimizers)
        if skipped is True:
            return True, ()
        if self._policy == "error":
            in_order = [step.optimizer for step in self._steps]
            nonfinite.refuse(snapshot, self._scoping.order, self._names.of_gradients(in_order))
        to_zero = nonfinite.without_nonfinite(snapshot) if self._policy == "zero" else ()
        if self.spikes is not None:
            norm = snapshot.joint_norm() if to_zero else snapshot.total_norm
            spike = self.spikes.should_skip(nonfinite.unless_told(norm, optimizers))
            if spike is True:
                return True, ()
            skipped = skipped if spike is False else spike if skipped is False else skipped | spike
        snapshot.set_thresholds(self._rule, skipped)
        if self.spikes is not None:
            snapshot.limit_all(self.spikes.clip_coef, self.spikes.limit)
        return skipped, to_zero

    def _measure_again(
        self, first: Snapshot, index: int
    ) -> tuple[Snapshot, bool | Tensor, Sequence[ClipSet]]:
        """The gradients after user code ran, with the thresholds that were decided before.

        User code may have replaced a gradient, changed it in place, or set one for a parameter that had none.
        """
        only = self._only(first, index)
        while True:
            asked = self._rule.asked
            snapshot = self.snapshot(first.own, only)
            snapshot.measure()
            skipped, to_zero = self._judge(snapshot, index)
            if not (self._rule.runs_user_code and self._rule.asked > asked):
                return snapshot, skipped, to_zero
            # The threshold of what was not there before was learned by the user's own code.
            self._rule.close()

    def _same_gradients(
        self, first: Snapshot, held: Sequence[Sequence[float]], to_zero: Sequence[ClipSet]
    ) -> tuple[Snapshot, Sequence[ClipSet]]:
        """The gradients after user code ran, which must not have changed sharded ones.

        Another rank may not run any user code, so measuring again could wait for it forever.
        """
        snapshot = self.snapshot(first.own)
        same_names = [p.names() for p in first.sets] == [p.names() for p in snapshot.sets]
        if not same_names or not _equal(held, snapshot.held_norms()):
            raise RuntimeError(
                "gradients were changed by `on_clip` or by the object that gives `max_norm`, but all ranks "
                "know their norm by now, and this one cannot measure it again alone; change sharded "
                "gradients before optimizer.step() or in a hook registered before the Clipper. The step was "
                "called off"
            )
        snapshot.take_decisions_of(first)
        return snapshot, [
            clip_set
            for clip_set, of_first in zip(snapshot.sets, first.sets, strict=True)
            if of_first in to_zero
        ]

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
        self._tell(self._skipped, index)
        if index in self._deferred:
            self._override(index).set(self._deferred[index].divisor)
            self._steps[index].undo_at_end(partial(self._divided, index))

    def _divided(self, index: int, outcome: Outcome) -> None:
        if outcome == "finished":  # a failed step may be taken again in this round
            self._deferred.pop(index).forget()

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
        if override is None:
            override = self._overrides[index] = fused.GradScaleOverride(self._steps[index].optimizer)
            self._steps[index].undo_at_end(partial(self._restore, index))
        return override

    def _restore(self, index: int, outcome: Outcome) -> None:
        override = self._overrides.pop(index, None)
        if override is not None:
            override.restore(outcome)

    def _apply(self, snapshot: Snapshot, row: Row, to_zero: Sequence[ClipSet], index: int) -> None:
        if row.skipped is True:
            self._skipped = self._skips
            return
        self._skipped = row.skipped
        self._tell(row.skipped, index)
        for clip_set in to_zero:
            clip_set.batch.zero_nonfinite_()
        if scalars.may_change(row.clip_coef):
            self._scale(snapshot, row.skipped, index)

    @property
    def _skips(self) -> bool:
        """Whether steps are skipped by this clipper, and not by a GradScaler alone."""
        return self._policy == "skip" or self.spikes is not None or len(self._steps) > 1

    def _tell(self, skipped: bool | Tensor, index: int) -> None:
        """Make a fused step skip itself, as hiding the gradients would wait for the device."""
        if not isinstance(skipped, bool) and self._skips:
            override = self._override(index)
            # A GradScaler may have its own reason to skip this optimizer's step.
            override.skip_where(skipped | nonfinite.is_skipped_by_scaler(self._steps[index].optimizer))

    def _scale(self, snapshot: Snapshot, skipped: bool | Tensor, index: int) -> None:
        """Multiply the gradients: now, or during the fused steps, as their ``grad_scale``."""
        if self.way is not None:
            self.not_fused = "the gradients are clipped in another way too, in place"
            snapshot.scale_()
            return
        reasons = {
            i: fused.why_not(self._steps[i].optimizer, self.hooks[i], snapshot)
            for i in (index, *snapshot.others(index))
        }
        self.not_fused = reasons[index]
        divisor = None
        fused_ones = [
            i
            for i, reason in reasons.items()
            if reason is None and (i == index or can_be_deferred(self._steps[i].optimizer))
        ]
        if fused_ones:
            divisor = fused.divisor(snapshot.sets[0].clip_coefs[0], snapshot.grad_scale)
            if divisor is None:
                self.not_fused = "what the step would have to divide by is no number of float32's range"
                fused_ones = []
        if not isinstance(skipped, bool) and not (fused_ones and len(reasons) == 1):
            snapshot.keep_where(skipped)
        if divisor is None or not fused_ones:
            snapshot.scale_()
            return
        if len(fused_ones) < len(reasons):
            snapshot.scale_but_(fused_ones)
        for i in fused_ones:
            if i == index:
                self._override(i).set(divisor)
                continue
            step, clip_coef = self._steps[i], snapshot.sets[0].clip_coefs[0]
            self._deferred[i] = Deferred(step.optimizer, step.member, clip_coef, divisor)


def _row(number: int, snapshot: Snapshot, skipped: bool | Tensor, loss: Loss) -> Row:
    norm = snapshot.total_norm
    norm = scalars.present(norm)
    if skipped is True:
        return Row(number, norm, math.inf, 1.0, True, loss)
    return Row(number, norm, snapshot.max_norm(), snapshot.clip_coef(), skipped, loss)


def _equal(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> bool:
    """Whether all numbers are equal, where NaN equals NaN."""
    return repr(a) == repr(b)
