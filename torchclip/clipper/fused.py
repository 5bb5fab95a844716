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
from torch.utils.hooks import RemovableHandle

from torchclip._core import gather
from torchclip._core.batch import Facts, Norm
from torchclip._core.ranks import meshes
from torchclip.clipper.optimizers import parameters_of
from torchclip.clipper.scope import Snapshot
from torchclip.clipper.step import Member, Outcome, is_fused

_CPU = torch.device("cpu")
_TOO_SMALL = Facts.SMALL
# A GradScaler may multiply it by its own scale, such as after a failed step.
_MOST = 2.0**100


def can_scale(optimizer: Optimizer, hook: RemovableHandle, snapshot: Snapshot, is_later: bool) -> bool:
    """Whether the clip coefficient can, and should, be passed to the step.

    Decisions about the gradients use facts that all ranks know, so that all of them decide alike.

    Args:
        optimizer: the optimizer, which is about to step.
        hook: the handle of the pre hook that clips.
        snapshot: the gradients.
        is_later: whether another optimizer steps first.
    """
    # Before a later step, not autograd but FSDP2 may add to the gradients.
    if not is_fused(optimizer) or (is_later and meshes.any_dtensor(parameters_of(optimizer))):
        return False
    # A later hook may look at the gradients.
    if next(reversed(hook.hooks_dict_ref() or {}), None) != hook.id:
        return False
    # There may be several coefficients, but there is one grad_scale.
    if len(snapshot.sets) != 1 or snapshot.sets[0].each:
        return False
    # A gradient of several parameters would be divided several times.  A grad_scale is a float32 number, too
    # coarse for float64 gradients.  Torch's fused steps write between the elements of gradients with gaps.
    # The Clipper multiplies few elements sooner.
    unfit = Facts.TIED | Facts.DOUBLE | Facts.GAPS | _TOO_SMALL
    return not (snapshot.repeats or snapshot.facts & unfit)


def divisor(clip_coef: Norm, grad_scale: Tensor | None) -> Tensor | None:
    """The number by which a fused step must divide the gradients; None if it is outside float32's range."""
    scale = 1.0 if grad_scale is None else grad_scale
    if not isinstance(clip_coef, float):
        return (scale / clip_coef).to(torch.float32)
    value = float(scale) / clip_coef if clip_coef else math.inf
    return torch.full((), value, dtype=torch.float32, device=_CPU) if not value > _MOST else None


class GradScaleOverride:
    """An optimizer's ``grad_scale`` during a step, and afterwards.

    A step that ends in an exception does not remove ``grad_scale``.  In its next step, a GradScaler would
    take it for one that the user has set, and multiply its own by it.

    Attributes:
        is_over: whether it was restored.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = ref(optimizer)  # a failed step leaves it until the next one
        self._found_inf = self._attributes.get("found_inf")
        self._had = "grad_scale" in self._attributes
        self._sets_found_inf = self.is_over = False
        self._before = self._left = self._attributes.get("grad_scale")

    @property
    def _attributes(self) -> dict[str, Any]:
        optimizer = self._optimizer()
        return {} if optimizer is None else vars(optimizer)

    @property
    def of_scaler(self) -> bool:
        """Whether a GradScaler takes this step."""
        return self._found_inf is not None and not self._sets_found_inf

    def set(self, value: Tensor) -> None:
        """Make the step divide by a number."""
        self._attributes["grad_scale"] = self._left = value

    def skip_where(self, skip: Tensor) -> None:
        """Make the step skip itself if a bool on the device is true."""
        self._sets_found_inf = not self.of_scaler
        self._attributes["found_inf"] = self._found_inf = skip.to(
            getattr(self._found_inf, "dtype", torch.float32)
        )

    def restore(self, outcome: Outcome) -> None:
        """Restore the previous value, or the one that the next step of a GradScaler needs."""
        self.is_over = True
        if self._sets_found_inf and self._attributes.get("found_inf") is self._found_inf:
            self._attributes.pop("found_inf")
            self._found_inf = None
        if outcome != "failed":
            self._set(self._before if self._had else None, self._had)
            return
        found_inf, now = self._attributes.get("found_inf"), self._attributes.get("grad_scale")
        # A GradScaler deletes both after its step, including what the user had set.
        had = self._had and not self.of_scaler
        kept = self._before if had else None
        if found_inf is self._found_inf and now is self._left:
            if self.of_scaler:
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


class Deferred:
    """A clip coefficient for the step of a fused optimizer later in the round.

    The optimizer may not step in this round at all.  So the gradients are multiplied in place before a
    backward pass adds to them, or when the round ends.

    Args:
        optimizer: the optimizer.
        member: the state of its hooks.
        clip_coef: the number to multiply the gradients by.
        divisor: the same as the ``grad_scale`` of its step.
    """

    def __init__(self, optimizer: Optimizer, member: Member, clip_coef: Norm, divisor: Tensor) -> None:
        self.divisor = divisor
        self._optimizer, self._member = ref(optimizer), member  # because the hooks are on its parameters
        self._clip_coef: Norm | None = clip_coef
        self._hooks: list[Any] = [
            p.register_hook(lambda _: self.apply())  # type: ignore[no-untyped-call]
            for p in parameters_of(optimizer)
            if p.requires_grad
        ]

    def apply(self) -> None:
        """Multiply now the gradients that nothing else has changed."""
        optimizer, clip_coef = self._optimizer(), self._clip_coef
        if optimizer is not None and clip_coef is not None:
            changed = {*map(id, self._member.changed())}
            same = [p for p in parameters_of(optimizer) if id(p.grad) not in changed]
            gather.gradients(same).scale_(clip_coef)
        self.forget()

    def end(self, outcome: Outcome) -> None:
        """Drop the coefficient if the step has used it; a failed one may be taken again in this round."""
        if outcome == "finished":
            self.forget()

    def forget(self) -> None:
        """Drop the coefficient."""
        self._clip_coef = None
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
