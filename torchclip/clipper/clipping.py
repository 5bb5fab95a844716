"""One clipping: what was measured is judged, and the gradients are changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torchclip._core import joint_norms, scalars
from torchclip._core.batch import Norm, Norms
from torchclip.clipper import fused, nonfinite
from torchclip.clipper.rules import clip_by, ratio
from torchclip.clipper.sets import ClipSet, Gradients
from torchclip.clipper.settings import Settings
from torchclip.clipper.step import Step


class Decision(NamedTuple):
    """What is done to the gradients.

    Attributes:
        skipped: whether the step is skipped; a truth value on the device if the host does not know it.
        max_norm: the smallest threshold.
        clip_coef: the smallest clip coefficient.
    """

    skipped: bool | Tensor
    max_norm: Norm
    clip_coef: Norm


_SKIPPED = Decision(True, math.inf, 1.0)


def decide(gradients: Gradients, settings: Settings, optimizer: Optimizer, number: int) -> Decision:
    """Decide what to do, without changing anything.

    Args:
        gradients: the gradients, which were measured.
        settings: the Clipper's.
        optimizer: the optimizer that is about to step.
        number: the number of the step.
    """
    optimizers, policy = gradients.optimizers, settings.nonfinite
    skipped: bool | Tensor = False
    # A GradScaler decides for each of several optimizers in its own step; a policy decides for all.
    if len(optimizers) == 1 or policy == "error":
        skipped = nonfinite.is_skipped_by_scaler(optimizer)
        # Deciding whether to raise waits for an accelerator.
        if skipped is True or (policy == "error" and skipped):
            return _SKIPPED
    if policy == "skip":
        skipped = skipped | nonfinite.should_skip(gradients, settings, skipped)
    elif policy == "error":
        nonfinite.check_finite(gradients, settings)
    zeroes = policy == "zero" and nonfinite.measure_finite(gradients)
    if settings.skip_above is not None and skipped is not True:
        norm = gradients.finite_norm() if zeroes else gradients.total_norm
        above = settings.skip_above.should_skip(nonfinite.deciding_norm(norm, optimizers), number)
        skipped = above if above is True or skipped is False else skipped | above
    if skipped is True:
        return _SKIPPED
    _limit(gradients, settings, skipped, number)
    return _summary(gradients, settings, skipped)


def _limit(gradients: Gradients, settings: Settings, skipped: bool | Tensor, number: int) -> None:
    """Set the threshold of each set: that of its parameter group, or what the bank answers.

    Nothing is learned of a step that is skipped.
    """
    bank, asked = settings.bank, []
    for clip_set in gradients.sets:
        if clip_set.own is None:
            asked.append(clip_set)
        else:
            clip_set.limit(clip_set.own, scalars.EPS)
    if not asked:
        return
    names, norms = gradients.observed(asked) if bank.learns else ([], [])
    norms = scalars.replaced(norms, skipped, math.nan)
    max_norms = bank.max_norms(names, norms, settings.norm_type, number)
    start = 0
    for clip_set in asked:
        end = start + len(clip_set.norms)
        clip_set.limit(max_norms if isinstance(max_norms, float) else max_norms[start:end], bank.eps)
        start = end


def _summary(gradients: Gradients, settings: Settings, skipped: bool | Tensor) -> Decision:
    """The smallest threshold and coefficient, and the limit of a step that is taken though it is above it."""
    sets, above = gradients.sets, settings.skip_above
    max_norm: Norm = math.inf
    if above is not None and scalars.may_change(above.clip_coef):
        max_norm = above.max_norm
        for clip_set in sets:
            if not clip_set.is_exempt:
                clip_set.clip_coefs = scalars.at_most(clip_set.clip_coefs, above.clip_coef)
    elif len(sets) == 1 and not settings.each:
        only = sets[0]
        return Decision(skipped, _first(only.max_norms), only.clip_coefs[0])
    present = [each for each in sets if not each.is_absent()] or sets
    of_sets = [_as_norms(each.max_norms) for each in present if len(each.norms)]
    max_norm = scalars.smallest([*of_sets, scalars.in_one([max_norm])], math.inf)
    return Decision(skipped, max_norm, scalars.smallest([each.clip_coefs for each in sets], 1.0))


def _first(max_norms: float | Norms) -> Norm:
    return max_norms if isinstance(max_norms, float) else max_norms[0]


def _as_norms(max_norms: float | Norms) -> Norms:
    return [max_norms] if isinstance(max_norms, float) else max_norms


def change(
    gradients: Gradients,
    settings: Settings,
    decision: Decision,
    step: Step,
    hook: RemovableHandle,
    local: bool,
) -> tuple[Decision, Norm | None]:
    """Change the gradients as was decided, or leave that to a fused step.

    Args:
        gradients: the gradients.
        settings: the Clipper's.
        decision: what was decided.
        step: that of the optimizer which is about to step.
        hook: the handle of the pre hook that clips.
        local: whether only this rank's part of them counts.

    Returns:
        What was done, and the norm after it, or None if it is that before times the coefficient.
    """
    gradients.zero_nonfinite_()
    if scalars.may_change(decision.clip_coef):
        divisor = None
        if settings.rule is None:
            divisor = fused.divisor(step, hook, gradients, decision.clip_coef)
        if divisor is not None:
            fused.override(step).set(divisor)
        else:
            if not isinstance(decision.skipped, bool):  # and the host does not know it: then times 1
                for clip_set in gradients.sets:
                    clip_set.clip_coefs = scalars.replaced(clip_set.clip_coefs, decision.skipped, 1.0)
            gradients.scale_()
    if settings.rule is not None:
        after = clip_by(settings.rule, gradients, settings, local)
        return decision._replace(clip_coef=ratio(after, gradients.total_norm)), scalars.present(after)
    return decision, _clipped_norm(gradients, settings)


def _clipped_norm(gradients: Gradients, settings: Settings) -> Norm | None:
    """The joint norm after clipping, if sets have different coefficients."""
    counted: Sequence[ClipSet] = [each for each in gradients.sets if not each.is_exempt] or gradients.sets
    if len(counted) == 1 and not (settings.each or counted[0].is_zeroed):
        return None
    norms = scalars.concatenate([_times(each.norms, each.clip_coefs) for each in counted])
    return scalars.present(joint_norms.join(norms, settings.norm_type))


def _times(norms: Norms, clip_coefs: Norms) -> Norms:
    """Norms after clipping; those that are ``ABSENT`` stay so, as they have the coefficient 1."""
    if isinstance(norms, list) and isinstance(clip_coefs, list):
        return [norm * coef for norm, coef in zip(norms, clip_coefs, strict=True)]
    device = scalars.device_of([norms, clip_coefs])
    assert device is not None
    return scalars.on_device(norms, device) * scalars.on_device(clip_coefs, device)
