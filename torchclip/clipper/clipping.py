"""One clipping: the gradients are measured, judged, reported, looked at again if need be, and changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from torch import Tensor

from torchclip._core import gather, scalars
from torchclip._core.batch import Facts, Norm
from torchclip._core.collectives import Kind
from torchclip.clipper import fused, nonfinite
from torchclip.clipper.limits import Limits
from torchclip.clipper.names import Names
from torchclip.clipper.nonfinite import Nonfinite
from torchclip.clipper.rules import Rule, copied_gradients, ratio, write_back
from torchclip.clipper.scope import Look, OwnMaxNorms, Part, Scoping, groups_of, own_max_norms
from torchclip.clipper.spikes import Spikes
from torchclip.clipper.step import Outcome, Step
from torchclip.history.records import Record, as_records
from torchclip.thresholds.bank import ThresholdBank

__all__ = ["Clipping", "Row"]

Loss: TypeAlias = float | Tensor | None


class Row(NamedTuple):
    """What ``History.append`` takes."""

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
        rule: what the thresholds are.
        scoping: what is clipped together.
        policy: what to do about a norm that is not finite.
        spikes: which steps are left out as their norm is too large; None for none.
        way: how gradients are clipped that are not clipped to a norm; None if all are.
        on_clip: whom to tell before anything changes.
        names: what to call the parameters.

    Attributes:
        hook_ids: the ids of the pre hooks that clip.
        not_fused: why the latest clip coefficient below 1 did not go along with a fused step.
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
        self.hook_ids: list[int] = []
        self.not_fused: str | None = None
        self._loans: dict[int, fused.Loan] = {}
        # Of the round that is open: whether it is skipped, and what fused steps have yet to divide by.
        self._skipped: bool | Tensor = False
        self._divisors: dict[int, Tensor] = {}
        # Who has let a round pass without a step: its gradients may be added to, so they are clipped at once.
        self._seldom: set[int] = set()

    def begin(self, index: int) -> None:
        """Take note of what a GradScaler has set for the step that begins, as it may end in an exception."""
        if "found_inf" in vars(self._steps[index].optimizer):
            self._borrow(index)

    def look(self, own: OwnMaxNorms = MappingProxyType({}), only: int | None = None) -> Look:
        """The gradients as they are now, not measured yet: of all optimizers, or only of one."""
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
        return Look(groups, self._scoping, own, grad_scale, names)

    def clip(self, number: int, look: Look, loss: Loss, index: int, tell: bool) -> Row:
        """Clip gradients that were measured just now.

        Args:
            number: the number of the step.
            look: the gradients.
            loss: what to record as the loss.
            index: which optimizer is about to step with them.
            tell: whether to call ``on_clip``.

        Returns:
            What to record.
        """
        self._skipped, self._divisors = False, {}
        limits = Limits(self._rule, number, self._scoping.order)
        asks_user = limits.runs_user_code or (self.spikes is not None and self.spikes.rule.runs_user_code)
        on_clip = self._on_clip if tell else None
        user_code = on_clip is not None or asks_user
        held = look.held_norms() if user_code else ()
        if self.spikes is not None:
            self.spikes.begin()
        skipped, to_zero, _ = self._judge(number, look, limits, index)
        row = _row(number, look, skipped, loss)
        if self.way is not None and skipped is not True:
            return self._clip_in_its_way(self.way, row, look, limits, to_zero, held, index, on_clip)
        if on_clip is not None:
            (record,) = as_records([row])
            on_clip(record)
        if user_code and skipped is not True:
            if look.facts & Facts.SHARDED:
                look, to_zero = self._same_gradients(look, held, to_zero)
            else:
                look, skipped, to_zero = self._look_again(number, look, limits, index)
                row = _row(number, look, skipped, loss)
        self._apply(look, row, to_zero, index)
        return row

    def _clip_in_its_way(
        self,
        way: Rule,
        row: Row,
        look: Look,
        limits: Limits,
        to_zero: Sequence[Part],
        held: Sequence[Sequence[float]],
        index: int,
        on_clip: Callable[[Record], object] | None,
    ) -> Row:
        """Clip by something else than a norm; what the norm is multiplied by is known only afterwards."""
        only = None if len(look.others(index)) == len(self._steps) - 1 else index
        if on_clip is None:
            self._apply(look, row, to_zero, index)
            return row._replace(clip_coef=self._apply_way(way, look, only))
        # Who is told before anything changes is told what comes out of copies.
        parameters = [p for part in look.parts for p in part.parameters]
        with copied_gradients(parameters) as copies:
            trial = self.look(look.own, only)
            trial.decided_as(look)
            for part in to_zero:
                trial.parts[look.parts.index(part)].batch.zero_nonfinite_()
            trial.scale_()
            row = row._replace(clip_coef=self._apply_way(way, trial, only))
        (record,) = as_records([row])
        on_clip(record)
        if not look.facts & Facts.SHARDED:
            look, skipped, to_zero = self._look_again(row.step, look, limits, index)
            row = _row(row.step, look, skipped, row.loss)
            self._apply(look, row, to_zero, index)
            return row if skipped is True else row._replace(clip_coef=self._apply_way(way, look, only))
        # Other ranks do not listen to this one's user: all that takes them was done on the copies.
        before = [grad for part in look.parts for grad in part.batch.all]
        now, _ = self._same_gradients(look, held, to_zero)
        self._tell(row.skipped, index)
        write_back(
            [grad for part in now.parts for grad in part.batch.all], [copies[id(grad)] for grad in before]
        )
        return row

    def _apply_way(self, way: Rule, look: Look, only: int | None) -> Norm:
        """Clip by something else than a norm; returns what the norm was multiplied by."""
        before = look.total_norm
        parameters = [p for part in look.parts if part.own is None for p in part.parameters]
        way.clip_(parameters, look.grad_scale)
        clipped = self.look(look.own, only)
        clipped.measure()
        return ratio(clipped.total_norm, before)

    def _judge(
        self, number: int, look: Look, limits: Limits, index: int
    ) -> tuple[bool | Tensor, Sequence[Part], bool]:
        """Decide what to do, without changing anything.

        Returns:
            Whether the step is left out, the parts whose non-finite elements are to be set to 0, and whether
            a threshold had to be asked for.
        """
        optimizers = [self._steps[i].optimizer for i in (index, *look.others(index))]
        skipped = nonfinite.skips(self._policy, look.total_norm, optimizers)
        if skipped is True:
            return True, (), False
        if self._policy == "error":
            nonfinite.refuse(look, self._scoping.order, self._names.of_gradients(optimizers))
        to_zero = nonfinite.without_nonfinite(look) if self._policy == "zero" else ()
        if self.spikes is not None:
            norm = look.joint_norm() if to_zero else look.total_norm
            spike = self.spikes.are_left_out(number, nonfinite.unless_told(norm, optimizers))
            if spike is True:
                return True, (), False
            skipped = skipped if spike is False else spike if skipped is False else skipped | spike
        asked = limits.set_for(look, skipped)
        if self.spikes is not None:
            look.limit_all(self.spikes.clip_coef, self.spikes.limit)
        return skipped, to_zero, asked

    def _look_again(
        self, number: int, first: Look, limits: Limits, index: int
    ) -> tuple[Look, bool | Tensor, Sequence[Part]]:
        """What the gradients are after user code ran, with the thresholds that were decided upon before.

        The user may have replaced a gradient, changed it in place, or given one to a parameter that had none.
        """
        while True:
            look = self.look(first.own)
            look.measure()
            skipped, to_zero, asked = self._judge(number, look, limits, index)
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

    def join(self, index: int) -> None:
        """Have a further optimizer step with the gradients that were clipped for all."""
        if self._skipped is True:
            self._steps[index].later(nonfinite.hide_gradients(self._steps[index].optimizer))
            return
        self._tell(self._skipped, index)
        divisor = self._divisors.pop(index, None)
        if divisor is not None:
            self._borrow(index).lend(divisor)

    def end(self) -> None:
        """Multiply what an optimizer did not step with in this round, if nothing else has changed it."""
        divisors, self._divisors, self._skipped = self._divisors, {}, False
        self._seldom.update(divisors)
        for index, divisor in divisors.items():
            member = self._steps[index].member
            if not member.changed():
                groups = self._steps[index].optimizer.param_groups
                batch = gather.gradients([p for group in groups for p in group["params"]])
                batch.scale_(1.0 / float(divisor))

    def forget(self) -> None:
        """Multiply nothing more in the round that was open."""
        self._skipped, self._divisors = False, {}

    def _borrow(self, index: int) -> fused.Loan:
        """The ``grad_scale`` of an optimizer, until its step is over."""
        loan = self._loans.get(index)
        if loan is None:
            loan = self._loans[index] = fused.Loan(self._steps[index].optimizer)
            self._steps[index].later(partial(self._give_back, index))
        return loan

    def _give_back(self, index: int, outcome: Outcome) -> None:
        loan = self._loans.pop(index, None)
        if loan is not None:
            loan.give_back(outcome)

    def _apply(self, look: Look, row: Row, to_zero: Sequence[Part], index: int) -> None:
        if row.skipped is True:
            if self._leaves_out:
                self._skipped = True
                self._steps[index].later(nonfinite.hide_gradients(self._steps[index].optimizer))
            return
        self._skipped = row.skipped
        self._tell(row.skipped, index)
        for part in to_zero:
            part.batch.zero_nonfinite_()
        if scalars.may_change(row.clip_coef):
            self._scale(look, row.skipped, index)

    @property
    def _leaves_out(self) -> bool:
        """Whether steps are left out by this clipper, and not by a GradScaler alone."""
        return self._policy == "skip" or self.spikes is not None or len(self._steps) > 1

    def _tell(self, skipped: bool | Tensor, index: int) -> None:
        """Have a fused step leave itself out: to hide the gradients would be to wait."""
        if isinstance(skipped, Tensor) and self._leaves_out:
            loan = self._borrow(index)
            # A GradScaler may have its own reason for this optimizer.
            found_inf = getattr(self._steps[index].optimizer, "found_inf", None)
            own = found_inf > 0 if isinstance(found_inf, Tensor) else False
            loan.tell(skipped | own)

    def _scale(self, look: Look, skipped: bool | Tensor, index: int) -> None:
        """Multiply the gradients: now, or within the fused steps, as their ``grad_scale``."""
        if self.way is not None:
            self.not_fused = "the gradients are clipped in another way too, in place"
            look.scale_()
            return
        reasons = {
            i: fused.why_not(self._steps[i].optimizer, self.hook_ids[i], look)
            for i in (index, *look.others(index))
        }
        self.not_fused = reasons[index]
        divisor = None
        fused_ones = [i for i, reason in reasons.items() if reason is None and i not in self._seldom]
        if fused_ones:
            divisor = fused.divisor(look.parts[0].clip_coefs[0], look.grad_scale)
            if divisor is None:
                self.not_fused = "what the step would have to divide by is no number of float32's range"
                fused_ones = []
        if isinstance(skipped, Tensor) and len(fused_ones) < len(reasons):
            look.leave_where(skipped)
        if not fused_ones:
            look.scale_()
            return
        if len(fused_ones) < len(reasons):
            look.scale_but_(fused_ones)
        assert divisor is not None
        self._divisors = dict.fromkeys(fused_ones, divisor)
        if index in fused_ones:
            self._borrow(index).lend(self._divisors.pop(index))


def _row(number: int, look: Look, skipped: bool | Tensor, loss: Loss) -> Row:
    norm = look.total_norm
    norm = scalars.present(norm)
    if skipped is True:
        return Row(number, norm, math.inf, 1.0, True, loss)
    return Row(number, norm, look.max_norm(), look.clip_coef(), skipped, loss)


def _equal(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> bool:
    """Whether all numbers are the same, where NaN is the same as NaN."""
    return repr(a) == repr(b)
