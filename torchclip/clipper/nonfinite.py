"""Steps whose gradients are not finite: left out, or taken with 0 in the place of what is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchclip._core import memory, scalars
from torchclip._core.batch import Norm
from torchclip.clipper.scope import Look, Part
from torchclip.clipper.step import Outcome

__all__ = ["Nonfinite", "hide_gradients", "refuse", "skips", "without_nonfinite"]

Nonfinite = Literal["propagate", "error", "skip", "zero"]

_REMEDY = "To go on, use `nonfinite='skip'` (leave such steps out) or 'zero' (put 0 in their place)"


def skips(policy: Nonfinite, total_norm: Norm, optimizer: Optimizer) -> bool | Tensor:
    """Whether a step is left out: by a GradScaler's decision, or because the norm is not finite.

    Args:
        policy: what to do about a norm that is not finite.
        total_norm: the norm.
        optimizer: the optimizer, whose ``found_inf`` a GradScaler sets if it is fused, and then leaves the
            step out itself.

    Returns:
        A tensor where nobody waits for it: the fused step has to be told.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    left_out: bool | Tensor = False
    if isinstance(found_inf, Tensor):  # without any gradient GradScaler makes it the number 0
        # To raise an error, or not, is to wait for an accelerator.
        if policy != "error" and not memory.on_host([found_inf]):
            left_out = found_inf > 0
        elif found_inf > 0:
            return True
    if policy != "skip":
        return left_out
    if isinstance(left_out, Tensor):
        return left_out | ~torch.as_tensor(total_norm, device=left_out.device).isfinite()
    norm = unless_told(total_norm, optimizer)
    return ~norm.isfinite() if isinstance(norm, Tensor) else not math.isfinite(norm)


def unless_told(norm: Norm, optimizer: Optimizer) -> Norm:
    """The norm that a step may be left out for: a number, unless the step is fused and can be told.

    For others this waits for an accelerator: they cannot leave a step out themselves.
    """
    return norm if _heeds_found_inf(optimizer) else float(norm)


def _heeds_found_inf(optimizer: Optimizer) -> bool:
    """Whether a step leaves itself out if ``found_inf`` says so."""
    return (
        getattr(optimizer, "_step_supports_amp_scaling", False)
        and type(optimizer).step.__module__.startswith("torch.optim.")
        and all(group.get("fused") for group in optimizer.param_groups)
    )


def refuse(look: Look, order: float, names: Mapping[int, str]) -> None:
    """Raise an error that names the gradients if the norm is not finite."""
    grads = [grad for part in look.parts for grad in part.batch.all]
    scalars.refuse_nonfinite(look.total_norm, order, grads, names, _REMEDY)


def without_nonfinite(look: Look) -> Sequence[Part]:
    """The parts with elements to be set to 0, measured as if they were.

    On an accelerator nobody waits to know which these are.
    """
    parts = [
        part
        for part in look.parts
        if isinstance(part.norms, Tensor) or not all(map(math.isfinite, part.norms))
    ]
    for part in parts:
        part.measure(look.grad_scale, finite=True)
    return parts


def hide_gradients(optimizer: Optimizer) -> Callable[[Outcome], None]:
    """Let a step see no gradients, so that it changes neither parameters nor state.

    Returns:
        What gives them back.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    hidden = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    attributes, zero_grad = vars(optimizer), optimizer.zero_grad
    before = attributes.get("zero_grad")

    def zero_hidden_too(set_to_none: bool = True) -> None:
        zero_grad(set_to_none)
        if set_to_none:
            hidden.clear()
        for _, grad in hidden:
            grad.detach().zero_()

    def give_back(outcome: Outcome) -> None:
        if before is None:
            del attributes["zero_grad"]
        else:
            attributes["zero_grad"] = before
        # New ones after a step that ended in an exception: then the old ones, all of them, are history.
        if outcome == "finished" or all(parameter.grad is None for parameter, _ in hidden):
            for parameter, grad in hidden:
                if parameter.grad is None:
                    parameter.grad = grad

    for parameter, _ in hidden:
        parameter.grad = None
    # A hook, or the step() of a subclass, may zero the gradients before the step is over.
    attributes["zero_grad"] = zero_hidden_too
    return give_back
