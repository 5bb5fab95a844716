"""The clip coefficient as the ``grad_scale`` of a fused step, which saves a pass over the gradients.

Fused optimizers divide the gradients by a ``grad_scale`` during their step, and leave them divided.  This
exists for GradScaler, which sets it for a step together with ``found_inf``, and deletes both afterwards.
"""

from __future__ import annotations

import math
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchclip._core import scalars
from torchclip._core.batch import Facts, Norm
from torchclip.clipper.sets import Gradients
from torchclip.clipper.step import Outcome, Step, is_fused

_CPU = torch.device("cpu")
_TOO_SMALL = Facts.SMALL
# A GradScaler may multiply it by its own scale, such as after a failed step.
_MOST = 2.0**100


def divisor(step: Step, gradients: Gradients, clip_coef: Norm, skipped: bool | Tensor) -> Tensor | None:
    """The number by which a fused step must divide the gradients; None if they must be scaled before it.

    Decisions about the gradients use facts that all ranks know, so that all of them decide alike.

    Args:
        step: the step that would divide them.
        gradients: the gradients.
        clip_coef: what they are to be multiplied by.
        skipped: whether the step is skipped; one that the device skips divides nothing, as `norms()` shows.
    """
    if len(gradients.optimizers) > 1 or not is_fused(gradients.optimizers[0]) or not _is_last_hook(step):
        return None
    # There may be several coefficients, but there is one grad_scale.  A gradient of several parameters would
    # be divided several times.  A grad_scale is a float32 number, too coarse for float64 gradients.  Torch's
    # fused steps write between the elements of gradients with gaps.  Few elements are sooner multiplied now.
    unfit = Facts.SHARED_GRADIENT | Facts.DOUBLE | Facts.GAPS | _TOO_SMALL
    if len(gradients.sets) != 1 or gradients.each or gradients.facts & unfit:
        return None
    if isinstance(skipped, Tensor):
        clip_coef = scalars.replaced(scalars.in_one([clip_coef]), skipped, 1.0)[0]
    scale = 1.0 if gradients.grad_scale is None else gradients.grad_scale
    if not isinstance(clip_coef, float):
        return (scale / clip_coef).to(torch.float32)
    value = float(scale) / clip_coef if clip_coef else math.inf
    # Outside float32's range, or of a NaN, the gradients are scaled as usual.
    return torch.full((), value, dtype=torch.float32, device=_CPU) if value <= _MOST else None


def _is_last_hook(step: Step) -> bool:
    """Whether no hook after the one that clips may look at the gradients."""
    hook = step.hooks[0]
    return next(reversed(hook.hooks_dict_ref() or {}), None) == hook.id


class GradScaleOverride:
    """An optimizer's ``grad_scale`` and ``found_inf`` during a step, and afterwards.

    A step that ends in an exception does not remove ``grad_scale``.  In its next step, a GradScaler would
    take it for one that the user has set, and multiply its own by it.

    Attributes:
        divides: whether the step clips the gradients.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = ref(optimizer)  # a failed step leaves it until the next one
        self._found_inf = self._attributes.get("found_inf")
        self._had = "grad_scale" in self._attributes
        self._sets_found_inf = False
        self._before = self._left = self._attributes.get("grad_scale")
        self.divides = False

    @property
    def _attributes(self) -> dict[str, Any]:
        optimizer = self._optimizer()
        return {} if optimizer is None else vars(optimizer)

    @property
    def _is_of_scaler(self) -> bool:
        """Whether a GradScaler takes this step."""
        return self._found_inf is not None and not self._sets_found_inf

    def set(self, value: Tensor) -> None:
        """Make the step divide by a number."""
        self._left = value  # first, as an interrupt may follow
        self.divides = True
        self._attributes["grad_scale"] = value

    def skip_where(self, skip: Tensor) -> None:
        """Make the step skip itself if a bool on the device is true."""
        self._sets_found_inf = not self._is_of_scaler
        self._found_inf = skip.to(getattr(self._found_inf, "dtype", torch.float32))
        self._attributes["found_inf"] = self._found_inf

    def restore(self, outcome: Outcome) -> None:
        """Restore the previous value, or the one that the next step of a GradScaler needs."""
        if self._sets_found_inf and self._attributes.get("found_inf") is self._found_inf:
            self._attributes.pop("found_inf")
        if self._sets_found_inf:
            self._found_inf = None
        if outcome != "failed":
            self._set(self._before if self._had else None, self._had)
            return
        found_inf, now = self._attributes.get("found_inf"), self._attributes.get("grad_scale")
        # A GradScaler deletes both after its step, including what the user had set.
        had = self._had and not self._is_of_scaler
        kept = self._before if had else None
        # An interrupt may come before the number was set, or after it was removed.
        if found_inf is self._found_inf and (now is self._left or now is self._before):
            if self._is_of_scaler:
                self._attributes.pop("found_inf", None)
            self._set(kept, had)
        elif now is self._left:  # a GradScaler's next step, of gradients that it has unscaled already
            self._set(kept, True)
        elif now is not None and self._left is not None:  # or multiplied by its scale
            self._set(now / self._left if kept is None else now / self._left * kept, True)

    def _set(self, grad_scale: Tensor | None, there: bool) -> None:
        if there:
            self._attributes["grad_scale"] = grad_scale
        else:
            self._attributes.pop("grad_scale", None)


def override(step: Step) -> GradScaleOverride:
    """The ``grad_scale`` of an optimizer until its step is over; made when it is first asked for."""
    if step.override is None:
        made = GradScaleOverride(step.optimizer)

        def restore(outcome: Outcome) -> None:
            made.restore(outcome)
            step.override = None

        step.undo_at_end(restore)
        step.override = made
    found: GradScaleOverride = step.override
    return found
