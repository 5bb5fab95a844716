"""Steps whose gradients are not finite: skipped, or refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchclip._core import gather, memory, scalars
from torchclip._core.batch import Norm
from torchclip._core.ranks.exchange import raise_pending
from torchclip.clipper.optimizers import parameters_of
from torchclip.clipper.sets import Gradients
from torchclip.clipper.settings import Settings
from torchclip.clipper.step import Outcome, Step, is_fused
from torchclip.history.breaks import where_it_broke

_REMEDY = "To go on, use `nonfinite='skip'` (skip such steps) or 'zero' (put 0 in their place)"
_TOO_MANY = (
    "{} steps in a row were skipped because their gradients are not finite, as many as `max_skips` allows, "
    "and this one would be the next: training does not go on. Lower the learning rate, look for the cause in "
    "the loss or the data, or do not pass `max_skips`"
)


def is_skipped_by_scaler(optimizer: Optimizer) -> bool | Tensor:
    """Whether a GradScaler has told a fused step to change nothing; a tensor if it is on a device."""
    found_inf = vars(optimizer).get("found_inf")
    if not isinstance(found_inf, Tensor):  # without gradients, GradScaler sets it to the number 0
        return False
    return bool(found_inf > 0) if memory.on_host([found_inf]) else found_inf > 0


def deciding_norm(norm: Norm, optimizers: Sequence[Optimizer]) -> Norm:
    """The norm that decides whether a step is skipped: a number, unless all steps are fused.

    For others this waits for an accelerator, as only fused steps can skip themselves.
    """
    return norm if isinstance(norm, float) or all(map(is_fused, optimizers)) else float(norm)


def should_skip(gradients: Gradients, settings: Settings, by_scaler: bool | Tensor) -> bool | Tensor:
    """Whether ``nonfinite="skip"`` skips the step; a tensor if the host does not wait for it.

    Args:
        gradients: the gradients.
        settings: the Clipper's.
        by_scaler: whether a GradScaler skips the step, which does not count for ``max_skips``.
    """
    whole_norm = gradients.whole_norm
    if by_scaler is False and isinstance(whole_norm, float) and math.isfinite(whole_norm):  # most steps
        settings.nonfinite_skips.add(False, False)
        return False
    skip: bool | Tensor
    if isinstance(by_scaler, Tensor):
        skip = ~torch.as_tensor(whole_norm, device=by_scaler.device).isfinite()
    else:
        norm = deciding_norm(whole_norm, gradients.optimizers)
        skip = (norm == math.inf) | (norm != norm)
    skips = settings.nonfinite_skips
    if skip is not False and skips.is_full() and bool(skip):
        _raise(gradients, settings, _TOO_MANY.format(int(skips.count)))
    skips.add(skip, by_scaler)
    return skip


def check_finite(gradients: Gradients, settings: Settings) -> None:
    """Raise an error that names the gradients if the norm is not finite."""
    if not math.isfinite(gradients.whole_norm):
        raise_pending()
        _raise(gradients, settings, _REMEDY)


def _raise(gradients: Gradients, settings: Settings, remedy: str) -> None:
    names = settings.names.of_gradients(gradients.optimizers)
    if settings.names.has_model:
        remedy = ". ".join(filter(None, (remedy, _where_it_broke(gradients, settings))))
    scalars.check_finite(gradients.whole_norm, settings.norm_type, gradients.all, names, remedy)


def _where_it_broke(gradients: Gradients, settings: Settings) -> str:
    """Where the backward pass stopped being finite, as far as this rank's parts show it."""
    named = settings.names.in_model_order(gradients.optimizers)
    return where_it_broke(
        [
            (name, math.isfinite(gather.local_gradients([p]).norm(math.inf)))
            for name, p in named.items()
            if p.grad is not None
        ]
    ).rstrip(".")


class _Hidden:
    """The gradients of an optimizer that are hidden from its step, and what else the step must not change.

    Optimizers such as those of schedule_free count their steps in their parameter groups.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        # A failed step may leave the optimizer in this state, which must not keep it alive.
        self._optimizer = ref(optimizer)
        self._grads = [(p, p.grad) for p in parameters_of(optimizer) if p.grad is not None]
        self._own_zero_grad = vars(optimizer).get("zero_grad")
        self._groups = [(group, dict(group), _contents(group)) for group in optimizer.param_groups]

    def hide(self) -> None:
        for parameter, _ in self._grads:
            parameter.grad = None
        optimizer = self._optimizer()
        if optimizer is not None:
            # A hook, or a subclass's step(), may zero the gradients before the step ends.
            vars(optimizer)["zero_grad"] = self._zero_too

    def _zero_too(self, set_to_none: bool = True) -> None:
        optimizer = self._optimizer()
        if self._own_zero_grad is not None:
            self._own_zero_grad(set_to_none)
        elif optimizer is not None:
            type(optimizer).zero_grad(optimizer, set_to_none)
        if set_to_none:
            self._grads.clear()
        for _, grad in self._grads:
            grad.detach().zero_()

    def restore(self, outcome: Outcome) -> None:
        optimizer = self._optimizer()
        attributes = {} if optimizer is None else vars(optimizer)
        if self._own_zero_grad is None:
            attributes.pop("zero_grad", None)
        else:
            attributes["zero_grad"] = self._own_zero_grad
        for group, values, contents in self._groups:
            group.update(values)  # first, so that an interrupt leaves no group without parameters
            for key in group.keys() - values.keys():
                del group[key]
            for key, content in contents.items():
                _put_back(values[key], content)
        # If there are new gradients after a failed step, all old ones are obsolete.
        if outcome == "finished" or all(p.grad is None or p.grad is grad for p, grad in self._grads):
            for parameter, grad in self._grads:
                if parameter.grad is None:
                    parameter.grad = grad


def hide_gradients(step: Step) -> None:
    """Hide the gradients from a step until it is over, so that it changes neither parameters nor state."""
    hidden = _Hidden(step.optimizer)
    step.undo_at_end(hidden.restore)
    hidden.hide()


def _contents(group: dict[str, Any]) -> dict[str, Any]:
    """Copies of the values of a parameter group that may change in place."""
    changeable = {key: value for key, value in group.items() if isinstance(value, (Tensor, list, dict))}
    return {
        key: value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)
        for key, value in changeable.items()
    }


def _put_back(value: Any, content: Any) -> None:
    """Give a value its content again."""
    if isinstance(value, Tensor):
        with torch.no_grad():
            value.copy_(content)
    elif isinstance(value, list):
        value[:] = content
    else:
        value.clear()
        value.update(content)
