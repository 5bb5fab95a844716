"""Clipping by another rule than a norm; the factor for the norm is known only afterwards."""

from __future__ import annotations

import torch

from torchclip._core import gather, scalars
from torchclip._core.batch import Norm
from torchclip._core.ranks import meshes
from torchclip.clipper.scope import Snapshot
from torchclip.thresholds.base import Rule


def clip_by(rule: Rule, snapshot: Snapshot) -> Norm:
    """Clip the gradients of all groups without a threshold of their own; returns the factor for the norm."""
    parameters = [p for clip_set in snapshot.sets if clip_set.own is None for p in clip_set.parameters]
    rule.clip_(parameters, snapshot.grad_scale)
    clipped = snapshot.again()
    clipped.measure()
    return ratio(clipped.total_norm, snapshot.total_norm)


def tried(rule: Rule, snapshot: Snapshot) -> tuple[Norm, Snapshot]:
    """Clip copies of the gradients; parameters that share a gradient share its copy.

    Returns:
        The factor for the norm, and the copies.
    """
    parameters = [p for clip_set in snapshot.sets for p in clip_set.parameters]
    with_gradient = [(p, p.grad) for p in parameters if p.grad is not None]
    copies = {id(grad): grad.detach().clone() for grad in gather.distinct_gradients(parameters)}
    try:
        for parameter, grad in with_gradient:
            parameter.grad = copies[id(grad)]
        trial = snapshot.again()
        trial.take_decisions_of(snapshot)
        trial.zero_nonfinite_()
        trial.scale_()
        return clip_by(rule, trial), trial
    finally:
        for parameter, grad in with_gradient:
            parameter.grad = grad


def write_back(snapshot: Snapshot, trial: Snapshot) -> None:
    """Copy values into gradients from those that were tried, which have the same layout on the ranks."""
    with torch.no_grad():
        for held, of_held in zip(
            meshes.locals_of(snapshot.grads), meshes.locals_of(trial.grads), strict=True
        ):
            held.copy_(of_held)
    torch.autograd.graph.increment_version(snapshot.grads)


def ratio(after: Norm, before: Norm) -> Norm:
    """The factor by which a norm changed, at most 1; 1 for no change, also of 0 or infinity."""
    is_same = (after == before) | (before == 0.0)
    quotient = after / scalars.where(is_same, 1.0, before)
    found: Norm = scalars.where(is_same | (quotient > 1.0), 1.0, quotient)
    return found
