"""Whether the gradients of several optimizers are those that were clipped when the first of them stepped."""

from __future__ import annotations

import math

from torchclip._core import gather
from torchclip.clipper.optimizers import parameters_of
from torchclip.clipper.step import Step

_SIZE = 8  # bytes of the fingerprint of a gradient


def mark(step: Step) -> None:
    """Take note of an optimizer's gradients as they are."""
    step.fingerprint = gather.fingerprint(parameters_of(step.optimizer))


def has_new(step: Step) -> bool:
    """Whether an optimizer has gradients that are not as they were, but for those that became 0."""
    parameters, before = parameters_of(step.optimizer), step.fingerprint
    now = gather.fingerprint(parameters)
    if now == before:
        return False
    known = {before[i : i + _SIZE] for i in range(0, len(before), _SIZE)}
    changed = [
        grad
        for i, grad in enumerate(gather.distinct_gradients(parameters))
        if now[_SIZE * i : _SIZE * (i + 1)] not in known
    ]
    return bool(changed) and not float(gather.tensors(changed).norm(math.inf)) <= 0


def check_unchanged(step: Step) -> None:
    """Raise an error if an optimizer steps with gradients that have changed since they were clipped."""
    if has_new(step):
        raise RuntimeError(
            f"the gradients of {step.name} have changed since they were clipped, before its step; "
            "with a GradScaler call `scaler.unscale_(optimizer)` for each optimizer of the Clipper before "
            "the first one steps; optimizers that step after backward passes of their own, as in a GAN, need "
            "a Clipper each. This step was called off"
        )


def check_after_closure(step: Step) -> None:
    """Raise an error if the closure of a later optimizer has computed new gradients."""
    if has_new(step):
        raise RuntimeError(
            f"the closure of {step.name} computed new gradients, but those of this round were "
            "clipped when another optimizer of the Clipper stepped; only the first one to step may take a "
            "closure"
        )


def check_unscaled(step: Step) -> None:
    """Raise an error if a GradScaler's scale still multiplies the gradients of one of several optimizers."""
    if vars(step.optimizer).get("grad_scale") is not None:
        raise RuntimeError(
            f"{step.name} steps with gradients that a GradScaler's scale still multiplies; call "
            "`scaler.unscale_(optimizer)` for each optimizer of the Clipper before the first one steps"
        )
