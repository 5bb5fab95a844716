"""Clipping by another rule than a norm; the factor for the norm is known only afterwards."""

from __future__ import annotations

from torchclip._core import scalars
from torchclip._core.batch import Norm
from torchclip.clipper.optimizers import joined
from torchclip.clipper.sets import Gradients
from torchclip.clipper.settings import Settings
from torchclip.thresholds.base import Rule


def clip_by(rule: Rule, gradients: Gradients, settings: Settings) -> Norm:
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


def ratio(after: Norm, before: Norm) -> Norm:
    """The factor by which a norm changed, at most 1; 1 for no change, also of 0 or infinity."""
    is_same = (after == before) | (before == 0.0)
    quotient = after / scalars.where(is_same, 1.0, before)
    found: Norm = scalars.where(is_same | (quotient > 1.0), 1.0, quotient)
    return found
