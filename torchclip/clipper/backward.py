"""Steps that are taken during a backward pass, when other gradients do not exist yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from torchclip._core import gather
from torchclip._core.ranks import meshes
from torchclip.clipper.optimizers import groups_of, parameters_of
from torchclip.clipper.sets import own_max_norm
from torchclip.clipper.settings import Settings

graph_task: Callable[[], int] = torch._C._current_graph_task_id
"""The number of the backward pass from which the caller is called; -1 if there is none."""


def check_in_backward(optimizers: Sequence[Optimizer], settings: Settings) -> bool:
    """Raise an error for a step that is taken during a backward pass, and needs what does not exist there.

    Returns:
        Whether the step can only be clipped without other ranks, which may be elsewhere in their pass.
    """
    if len(optimizers) > 1:
        raise RuntimeError(
            "an optimizer steps during the backward pass, but its Clipper has several optimizers, whose "
            "gradients are not there yet. Make a Clipper for each of them, such as "
            "[torchclip.Clipper(optimizer, max_norm) for optimizer in optimizers], or call optimizer.step() "
            "after backward()"
        )
    if settings.skip_loss_above is not None and meshes.has_ranks() and dist.get_world_size() > 1:
        raise RuntimeError(
            "`skip_loss_above` needs the losses of other ranks, which may be elsewhere in their backward "
            "passes. Do not pass it, or call optimizer.step() after backward()"
        )
    parameters = parameters_of(*optimizers)
    if settings.groups is None and not meshes.any_dtensor(parameters):
        return False
    if settings.groups is not None or _takes_norm(optimizers[0], settings):
        raise RuntimeError(
            "the gradients of a step that is taken during the backward pass are sharded; their norm "
            "takes other ranks, which may be elsewhere in theirs. Use `Value`, which takes no norm, or "
            "`max_norm=inf`, with nonfinite='propagate' and no `layers_every`; or call optimizer.step() "
            "after backward()"
        )
    if any(map(meshes.pending, gather.distinct_gradients(parameters))):
        raise RuntimeError(
            "the gradients of a step that is taken during the backward pass are pending a reduction over "
            "ranks. Call optimizer.step() after backward()"
        )
    return True


def _takes_norm(optimizer: Optimizer, settings: Settings) -> bool:
    """Whether a norm is needed before the gradients are changed."""
    limits = {*map(own_max_norm, groups_of([optimizer]))}
    if settings.nonfinite != "propagate" or settings.limits or limits - {None, math.inf}:
        return True
    if settings.norm_type <= 0 or settings.layers_every:
        return True
    if settings.rule is not None:
        return not getattr(settings.rule, "_by_element", False)
    return None in limits and settings.bank.number != math.inf
