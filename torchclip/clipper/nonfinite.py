"""Steps whose gradients are not finite: skipped, or taken with non-finite elements set to 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchclip._core import memory, scalars
from torchclip._core.batch import Norm
from torchclip._core.ranks.exchange import raise_pending
from torchclip.clipper.optimizers import parameters_of
from torchclip.clipper.scope import Snapshot
from torchclip.clipper.settings import Nonfinite
from torchclip.clipper.step import Outcome, is_fused

_REMEDY = "To go on, use `nonfinite='skip'` (skip such steps) or 'zero' (put 0 in their place)"


def skips(policy: Nonfinite, total_norm: Norm, optimizers: Sequence[Optimizer]) -> bool | Tensor:
    """Whether a step is skipped: by a GradScaler's decision, or because the norm is not finite.

    Args:
        policy: what to do about a norm that is not finite.
        total_norm: the norm.
        optimizers: the optimizer that is about to step, whose ``found_inf`` a GradScaler sets if it is fused,
            so that it skips the step itself; and those that will step with the same gradients.

    Returns:
        A tensor if the host does not wait for it, to be passed to the fused steps.
    """
    skip: bool | Tensor = False
    # A GradScaler decides for each of several optimizers in its own step; a policy decides for all.
    decides = len(optimizers) == 1 or policy == "error"
    if decides:
        skip = is_skipped_by_scaler(optimizers[0])
        # Deciding whether to raise waits for an accelerator.
        if skip is True or (policy == "error" and skip):
            return True
    if policy != "skip":
        return skip
    if not isinstance(skip, bool):
        return skip | ~torch.as_tensor(total_norm, device=skip.device).isfinite()
    norm = deciding_norm(total_norm, optimizers)
    return (norm == math.inf) | (norm != norm)


def is_skipped_by_scaler(optimizer: Optimizer) -> bool | Tensor:
    """Whether a GradScaler has told a fused step to change nothing; a tensor if it is on a device."""
    found_inf = getattr(optimizer, "found_inf", None)
    if not isinstance(found_inf, Tensor):  # without gradients, GradScaler sets it to the number 0
        return False
    return bool(found_inf > 0) if memory.on_host([found_inf]) else found_inf > 0


def deciding_norm(norm: Norm, optimizers: Sequence[Optimizer]) -> Norm:
    """The norm that decides whether a step is skipped: a number, unless all steps are fused.

    For others this waits for an accelerator, as only fused steps can skip themselves.
    """
    return norm if all(map(is_fused, optimizers)) else float(norm)


def refuse(snapshot: Snapshot, order: float, names: Mapping[int, str]) -> None:
    """Raise an error that names the gradients if the norm is not finite."""
    raise_pending()
    scalars.refuse_nonfinite(snapshot.total_norm, order, snapshot.grads, names, _REMEDY)


def mark_nonfinite(snapshot: Snapshot) -> bool:
    """Decide on the sets whose non-finite elements become 0, and measure them as if these were 0.

    On an accelerator this does not wait to find out which these are.

    Returns:
        Whether there are any.
    """
    for each in snapshot.sets:
        each.is_zeroed = not (isinstance(each.norms, list) and all(map(math.isfinite, each.norms)))
    sets = [each for each in snapshot.sets if each.is_zeroed]
    snapshot.measure_sets(sets, finite=True)
    return bool(sets)


def hide_gradients(optimizer: Optimizer) -> Callable[[Outcome], None]:
    """Hide the gradients from a step, so that it changes neither parameters nor state.

    Returns:
        A function that restores them.
    """
    hidden = [(p, p.grad) for p in parameters_of(optimizer) if p.grad is not None]
    # A failed step may leave the optimizer in this state, which must not keep it alive.
    held, own_zero_grad = ref(optimizer), vars(optimizer).get("zero_grad")

    def zero_hidden_too(set_to_none: bool = True) -> None:
        zeroed = held()
        if own_zero_grad is not None:
            own_zero_grad(set_to_none)
        elif zeroed is not None:
            type(zeroed).zero_grad(zeroed, set_to_none)
        if set_to_none:
            hidden.clear()
        for _, grad in hidden:
            grad.detach().zero_()

    def restore(outcome: Outcome) -> None:
        attributes = {} if (hiding := held()) is None else vars(hiding)
        if own_zero_grad is None:
            attributes.pop("zero_grad", None)
        else:
            attributes["zero_grad"] = own_zero_grad
        # If there are new gradients after a failed step, all old ones are obsolete.
        if outcome == "finished" or all(parameter.grad is None for parameter, _ in hidden):
            for parameter, grad in hidden:
                if parameter.grad is None:
                    parameter.grad = grad

    for parameter, _ in hidden:
        parameter.grad = None
    # A hook, or a subclass's step(), may zero the gradients before the step ends.
    vars(optimizer)["zero_grad"] = zero_hidden_too
    return restore
