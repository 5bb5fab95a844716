"""One clipping: the gradients are measured, judged, reported, looked at again if need be, and changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from torchclip._core.batch import Facts, Norm
from torchclip.clipper import fused, nonfinite
from torchclip.clipper.limits import Limits
from torchclip.clipper.nonfinite import Nonfinite
from torchclip.clipper.rules import Rule, copied_gradients, ratio, write_back
from torchclip.clipper.scope import Look, Part, Scoping, own_max_norms
from torchclip.clipper.spikes import Spikes
from torchclip.clipper.step import Outcome, Step
from torchclip.history.records import Record, as_records
from torchclip.thresholds.bank import ThresholdBank

__all__ = ["Clipping", "Row"]


class Row(NamedTuple):
    """What ``History.append`` takes."""

    step: int
    total_norm: Norm
    max_norm: Norm
    clip_coef: Norm
    skipped: bool | Tensor


class Clipping:
    """How the gradients of an optimizer are clipped.

    Args:
        step: the step of the optimizer that the gradients are for.
        rule: what the thresholds are.
        scoping: what is clipped together.
        policy: what to do about a norm that is not finite.
        spikes: which steps are left out as their norm is too large; None for none.
        way: how gradients are clipped that are not clipped to a norm; None if all are.
        on_clip: whom to tell before anything changes.
        names: what to call the gradients in an error, by their ids.

    Attributes:
        hook_id: the id of the pre hook that clips.
        not_fused: why the latest clip coefficient below 1 did not go along with a fused step.
    """

    def __init__(
        self,
        step: Step,
        rule: ThresholdBank,
        scoping: Scoping,
        policy: Nonfinite,
        spikes: Spikes | None,
        way: Rule | None,
        on_clip: Callable[[Record], object] | None,
        names: Callable[[], Mapping[int, str]],
    ) -> None:
        self._step, self._rule, self._scoping, self._policy = step, rule, scoping, policy
        self.spikes, self.way = spikes, way
        self._on_clip, self._names = on_clip, names
        self.hook_id = -1
        self.not_fused: str | None = None
        self._loan: fused.Loan | None = None

    def begin(self) -> None:
        """Take note of what a GradScaler has set for the step that begins, as it may end in an exception."""
        if "found_inf" in vars(self._step.optimizer):
            self._borrow()

    def look(self, own: Sequence[float | None] = ()) -> Look:
        """The gradients as they are now, not measured yet."""
        optimizer = self._step.optimizer
        return Look(optimizer, self._scoping, own_max_norms(optimizer.param_groups, own))

    def clip(self, number: int, look: Look) -> Row:
        """Clip gradients that were measured just now.

        Args:
            number: the number of the step.
            look: the gradients.

        Returns:
            What to record.
        """
        limits = Limits(self._rule, number, self._scoping.order)
        asks_user = limits.runs_user_code or (self.spikes is not None and self.spikes.rule.runs_user_code)
        user_code = self._on_clip is not None or asks_user
        held = look.held_norms() if user_code else ()
        if self.spikes is not None:
            self.spikes.begin()
        skipped, to_zero, _ = self._judge(number, look, limits)
        if self.way is not None and skipped is not True:
            return self._clip_in_its_way(self.way, number, look, limits, skipped, to_zero, held)
        row = _row(number, look, skipped)
        if self._on_clip is not None:
            (record,) = as_records([row])
            self._on_clip(record)
        if user_code and skipped is not True:
            if look.facts & Facts.SHARDED:
                look, to_zero = self._same_gradients(look, held, to_zero)
            else:
                look, skipped, to_zero = self._look_again(number, look, limits)
                row = _row(number, look, skipped)
        self._apply(look, row, to_zero)
        return row

    def _clip_in_its_way(
        self,
        way: Rule,
        number: int,
        look: Look,
        limits: Limits,
        skipped: bool | Tensor,
        to_zero: Sequence[Part],
        held: Sequence[Sequence[float]],
    ) -> Row:
        """Clip by something else than a norm; what the norm is multiplied by is known only afterwards."""
        row = _row(number, look, skipped)
        if self._on_clip is None:
            self._apply(look, row, to_zero)
            return row._replace(clip_coef=self._apply_way(way, look))
        # Who is told before anything changes is told what comes out of copies.
        parameters = [p for part in look.parts for p in part.parameters]
        with copied_gradients(parameters) as copies:
            trial = self.look(look.own)
            trial.decided_as(look)
            for part in to_zero:
                trial.parts[look.parts.index(part)].batch.zero_nonfinite_()
            trial.scale_()
            row = row._replace(clip_coef=self._apply_way(way, trial))
        (record,) = as_records([row])
        self._on_clip(record)
        if not look.facts & Facts.SHARDED:
            look, skipped, to_zero = self._look_again(number, look, limits)
            row = _row(number, look, skipped)
            self._apply(look, row, to_zero)
            return row if skipped is True else row._replace(clip_coef=self._apply_way(way, look))
        # Other ranks do not listen to this one's user: all that takes them was done on the copies.
        before = [grad for part in look.parts for grad in part.batch.all]
        now, _ = self._same_gradients(look, held, to_zero)
        self._tell(row)
        write_back(
            [grad for part in now.parts for grad in part.batch.all], [copies[id(grad)] for grad in before]
        )
        return row

    def _apply_way(self, way: Rule, look: Look) -> Norm:
        """Clip by something else than a norm; returns what the norm was multiplied by."""
        before = look.total_norm
        parameters = [p for part in look.parts if part.own is None for p in part.parameters]
        way.clip_(parameters, look.grad_scale)
        clipped = self.look(look.own)
        clipped.measure()
        return ratio(clipped.total_norm, before)

    def _judge(self, number: int, look: Look, limits: Limits) -> tuple[bool | Tensor, Sequence[Part], bool]:
        """Decide what to do, without changing anything.

        Returns:
            Whether the step is left out, the parts whose non-finite elements are to be set to 0, and whether
            a threshold had to be asked for.
        """
        optimizer = self._step.optimizer
        skipped = nonfinite.skips(self._policy, look.total_norm, optimizer)
        if skipped is True:
            return True, (), False
        if self._policy == "error":
            nonfinite.refuse(look, self._scoping.order, self._names())
        to_zero = nonfinite.without_nonfinite(look) if self._policy == "zero" else ()
        if self.spikes is not None:
            norm = look.joint_norm() if to_zero else look.total_norm
            spike = self.spikes.are_left_out(number, nonfinite.unless_told(norm, optimizer))
            if spike is True:
                return True, (), False
            skipped = skipped if spike is False else spike if skipped is False else skipped | spike
        asked = limits.set_for(look, skipped)
        if self.spikes is not None:
            look.limit_all(self.spikes.clip_coef, self.spikes.limit)
        return skipped, to_zero, asked

    def _look_again(
        self, number: int, first: Look, limits: Limits
    ) -> tuple[Look, bool | Tensor, Sequence[Part]]:
        """What the gradients are after user code ran, with the thresholds that were decided upon before.

        The user may have replaced a gradient, changed it in place, or given one to a parameter that had none.
        """
        while True:
            look = self.look(first.own)
            look.measure()
            skipped, to_zero, asked = self._judge(number, look, limits)
            if not (asked and limits.runs_user_code):
                return look, skipped, to_zero
            # The threshold of what was not there before was learned by the user's own code.
            limits.close()

    def _same_gradients(
        self, first: Look, held: Sequence[Sequence[float]], to_zero: Sequence[Part]
    ) -> tuple[Look, Sequence[Part]]:
        """What the gradients are after user code ran, which must not have changed sharded ones.

        Another rank may not run any user code, so that to measure again would be to wait for it forever.
        """
        look = self.look(first.own)
        same_names = [p.names() for p in first.parts] == [p.names() for p in look.parts]
        if not same_names or not _equal(held, look.held_norms()):
            raise RuntimeError(
                "gradients were changed by `on_clip` or by what was asked for a `max_norm`, but all ranks "
                "know their norm by now, and this one cannot take it again alone; change sharded gradients "
                "before optimizer.step() or in a hook registered before the Clipper. The step was called off"
            )
        look.decided_as(first)
        return look, [
            part for part, of_first in zip(look.parts, first.parts, strict=True) if of_first in to_zero
        ]

    # Changing

    def _borrow(self) -> fused.Loan:
        """The optimizer's ``grad_scale``, until this step is over."""
        loan = self._loan
        if loan is None:
            loan = self._loan = fused.Loan(self._step.optimizer)
            self._step.later(self._give_back)
        return loan

    def _give_back(self, outcome: Outcome) -> None:
        loan, self._loan = self._loan, None
        if loan is not None:
            loan.give_back(outcome)

    def _apply(self, look: Look, row: Row, to_zero: Sequence[Part]) -> None:
        if row.skipped is True:
            if self._leaves_out:
                self._step.later(nonfinite.hide_gradients(self._step.optimizer))
            return
        self._tell(row)
        for part in to_zero:
            part.batch.zero_nonfinite_()
        if isinstance(row.clip_coef, Tensor) or row.clip_coef != 1.0:
            self._scale(look, row.skipped)

    @property
    def _leaves_out(self) -> bool:
        """Whether steps are left out by this clipper, and not by a GradScaler alone."""
        return self._policy == "skip" or self.spikes is not None

    def _tell(self, row: Row) -> None:
        """Have a fused step leave itself out: to hide the gradients would be to wait."""
        if isinstance(row.skipped, Tensor) and self._leaves_out:
            self._borrow().tell(row.skipped)

    def _scale(self, look: Look, skipped: bool | Tensor) -> None:
        """Multiply the gradients: now, or within a fused step, as its ``grad_scale``."""
        optimizer = self._step.optimizer
        if self.way is not None:
            self.not_fused = "the gradients are clipped in another way too, in place"
            look.scale_()
            return
        self.not_fused = fused.why_not(optimizer, self.hook_id, look)
        if self.not_fused is None:
            divisor = fused.divisor(look.parts[0].clip_coefs[0], look.grad_scale)
            if divisor is not None:
                self._borrow().lend(divisor)
                return
            self.not_fused = "what the step would have to divide by is no number of float32's range"
        if isinstance(skipped, Tensor):
            look.leave_where(skipped)
        look.scale_()


def _row(number: int, look: Look, skipped: bool | Tensor) -> Row:
    norm = look.total_norm
    norm = norm.clamp(min=0.0) if isinstance(norm, Tensor) else 0.0 if norm < 0 else norm
    if skipped is True:
        return Row(number, norm, math.inf, 1.0, True)
    return Row(number, norm, look.max_norm(), look.clip_coef(), skipped)


def _equal(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> bool:
    """Whether all numbers are the same, where NaN is the same as NaN."""
    return repr(a) == repr(b)
