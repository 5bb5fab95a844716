"""One clipping: what was measured is judged, and the gradients are changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchclip._core import joint_norms, scalars
from torchclip._core.batch import Norm, Norms
from torchclip.clipper import fused, nonfinite
from torchclip.clipper.mean_loss import mean_loss
from torchclip.clipper.optimizers import joined
from torchclip.clipper.sets import ClipSet, Gradients
from torchclip.clipper.settings import Settings
from torchclip.clipper.skip_above import SkipAbove
from torchclip.clipper.step import Step
from torchclip.thresholds.bank import ThresholdBank
from torchclip.thresholds.base import Rule

Decision: TypeAlias = tuple[bool | Tensor, Norm, Norm]
"""Whether the step is skipped, the smallest threshold, and the smallest clip coefficient.

Whether it is skipped is a truth value on the device if the host does not know it.
"""
_SKIPPED: Decision = (True, math.inf, 1.0)


def decide(
    gradients: Gradients,
    settings: Settings,
    optimizer: Optimizer,
    number: int,
    loss: float | Tensor | None,
) -> Decision:
    """Decide what to do; only ``nonfinite="zero"`` changes gradients here, whose norms then decide.

    Args:
        gradients: the gradients, which were measured.
        settings: the Clipper's.
        optimizer: the optimizer that is about to step.
        number: the number of the step.
        loss: the loss of the step, if it is known.
    """
    skipped: bool | Tensor = False
    if settings.may_refuse or "found_inf" in vars(optimizer):
        skipped = _should_skip(gradients, settings, optimizer, number, loss)
        if skipped is True:
            return _SKIPPED
    bank, sets, asked = settings.bank, gradients.sets, []
    max_norm = bank.number
    for clip_set in sets:
        limit = clip_set.own
        if limit is None:
            if bank.learns:
                asked.append(clip_set)
                continue
            if max_norm is None:
                max_norm = bank.called(number)
            limit = max_norm
        clip_set.max_norms, clip_set.clip_coefs = limit, scalars.clip_coefs(limit, clip_set.norms)
    if asked:
        _ask(bank, asked, gradients, settings, skipped)
    max_norms, clip_coefs = sets[0].max_norms, sets[0].clip_coefs
    if len(sets) > 1 or len(clip_coefs) != 1 or settings.skip_above is not None:
        return skipped, *_smallest(sets, settings.skip_above)
    return skipped, max_norms if isinstance(max_norms, float) else max_norms[0], clip_coefs[0]


def _should_skip(
    gradients: Gradients, settings: Settings, optimizer: Optimizer, number: int, loss: Any
) -> bool | Tensor:
    """Whether a GradScaler or the Clipper skips the step; raises an error if ``nonfinite`` says so."""
    optimizers, policy = gradients.optimizers, settings.nonfinite
    if settings.skip_loss_above is not None:  # first, as all ranks must take part
        loss = mean_loss(loss, optimizers, settings.groups, settings.names)
    skipped: bool | Tensor = False
    # A GradScaler decides for each of several optimizers in its own step; a policy decides for all.
    if len(optimizers) == 1 or policy == "error":
        if "found_inf" in vars(optimizer):
            skipped = nonfinite.is_skipped_by_scaler(optimizer)
        # Deciding whether to raise waits for an accelerator.
        if skipped is True or (policy == "error" and skipped):
            return True
    if policy == "skip":
        skipped = skipped | nonfinite.should_skip(gradients, settings, skipped)
    elif policy == "error":
        skipped = False  # which the host knows now; another optimizer may be unable to skip itself
        nonfinite.check_finite(gradients, settings)
    zeroes = policy == "zero" and gradients.zero_nonfinite_()
    if settings.limits and skipped is not True:
        norm = gradients.joint_norm(gradients.counted) if zeroes else gradients.total_norm
        skipped = _skipped_above(settings, nonfinite.deciding_norm(norm, optimizers), loss, skipped, number)
    return skipped


def _skipped_above(
    settings: Settings, norm: Norm, loss: Any, skipped: bool | Tensor, number: int
) -> bool | Tensor:
    """Whether a step is skipped, also because its norm or its loss is above a limit; both learn from it."""
    unlearned = skipped
    for limit, judged in ((settings.skip_above, norm), (settings.skip_loss_above, loss)):
        if limit is not None:
            if isinstance(unlearned, Tensor):  # from such a step nothing is learned, as on the host
                norms = scalars.on_device([judged], unlearned.device)
                judged = scalars.replaced(norms, unlearned, math.nan)[0]
            is_above = limit.should_skip(judged, number)
            if skipped is not True:
                skipped = is_above if is_above is True or skipped is False else skipped | is_above
    return skipped


def _ask(
    bank: ThresholdBank,
    sets: Sequence[ClipSet],
    gradients: Gradients,
    settings: Settings,
    skipped: bool | Tensor,
) -> None:
    """Set the thresholds of some sets to what the bank answers; nothing is learned of a skipped step."""
    names, norms = gradients.observed(sets)
    if skipped is not False:
        norms = scalars.replaced(norms, skipped, math.nan)
    max_norms: Any = bank.max_norms(names, norms, settings.norm_type)
    start = 0
    for clip_set in sets:
        end = start + len(clip_set.norms)
        clip_set.max_norms = limits = max_norms[start:end]
        clip_set.clip_coefs = scalars.clip_coefs(limits, clip_set.norms, bank.eps)
        start = end


def _smallest(sets: Sequence[ClipSet], above: SkipAbove | None) -> tuple[Norm, Norm]:
    """The smallest threshold and coefficient, with those of a step that is taken above its ``skip_above``."""
    limits = list[Norms]()
    if above is not None and scalars.may_change(above.clip_coef):
        limits.append(scalars.in_one([above.max_norm]))
        for clip_set in sets:
            if not clip_set.is_exempt:
                clip_set.clip_coefs = scalars.at_most(clip_set.clip_coefs, above.clip_coef)
    for clip_set in sets:
        limits.append(_compared(clip_set))
    clip_coefs = scalars.concatenate([each.clip_coefs for each in sets])
    return scalars.smallest(scalars.concatenate(limits), math.inf), scalars.smallest(clip_coefs, 1.0)


def _compared(clip_set: ClipSet) -> Norms:
    """The thresholds with which the norms of a set are compared: none where there is nothing to measure.

    On a device, that is only possible where elements that are not finite do not count.
    """
    norms, max_norms = clip_set.norms, clip_set.max_norms
    limits = [max_norms] if isinstance(max_norms, float) else max_norms
    if isinstance(norms, list):
        return [] if all(norm < 0 for norm in norms) else limits
    if clip_set.is_zeroed:
        return torch.where(norms < 0, math.inf, scalars.on_device(limits, norms.device))
    return limits


def change(
    gradients: Gradients, settings: Settings, decision: Decision, step: Step
) -> tuple[Norm, Norm | None]:
    """Change the gradients as was decided, or leave that to a fused step.

    Args:
        gradients: the gradients.
        settings: the Clipper's.
        decision: what was decided.
        step: that of the optimizer which is about to step.

    Returns:
        The coefficient, and the norm after clipping, or None if it is the norm before times the coefficient.
    """
    skipped, _, clip_coef = decision
    if scalars.may_change(clip_coef):
        divisor = fused.divisor(step, gradients, clip_coef, skipped) if settings.rule is None else None
        if divisor is not None:
            fused.override(step).set(divisor)
        else:
            gradients.scale_(skipped)
    if settings.rule is not None:
        after = _clip_by(settings.rule, gradients, settings)
        return _ratio(after, gradients.total_norm), scalars.present(after)
    if len(gradients.sets) == 1 and not settings.each and not gradients.sets[0].is_zeroed:
        return clip_coef, None
    return clip_coef, _clipped_norm(gradients, settings)


def _clipped_norm(gradients: Gradients, settings: Settings) -> Norm:
    """The joint norm after clipping.

    A gradient that several sets share has the lowest of their coefficients, so that all are measured again.
    With `group` other ranks may share none, and would not exchange another norm.
    """
    if gradients.overlaps and settings.groups is None:
        return scalars.present(Gradients(gradients.optimizers, settings, gradients.is_local).total_norm)
    norms = scalars.concatenate([_times(each.norms, each.clip_coefs) for each in gradients.counted])
    return scalars.present(joint_norms.join(norms, settings.norm_type))


def _times(norms: Norms, clip_coefs: Norms) -> Norms:
    """Norms after clipping; those that are ``ABSENT`` stay so, as they have the coefficient 1."""
    if isinstance(norms, list) and isinstance(clip_coefs, list):
        return [norm * coef for norm, coef in zip(norms, clip_coefs, strict=True)]
    device = scalars.device_of([norms, clip_coefs])
    assert device is not None
    return scalars.on_device(norms, device) * scalars.on_device(clip_coefs, device)


def _clip_by(rule: Rule, gradients: Gradients, settings: Settings) -> Norm:
    """Clip the gradients of all groups without a threshold of their own; returns the norm after that.

    Args:
        rule: the rule.
        gradients: the gradients, which were measured.
        settings: the Clipper's.
    """
    lists = [clip_set.parameters for clip_set in gradients.sets if clip_set.own is None]
    if lists:
        rule.clip_(joined(lists), gradients.grad_scale)
    return Gradients(gradients.optimizers, settings, gradients.is_local).total_norm


def _ratio(after: Norm, before: Norm) -> Norm:
    """The factor by which a norm changed, at most 1; 1 for no change, also of 0 or infinity."""
    is_same = (after == before) | (before == 0.0)
    quotient = after / scalars.where(is_same, 1.0, before)
    found: Norm = scalars.where(is_same | (quotient > 1.0), 1.0, quotient)
    return found
