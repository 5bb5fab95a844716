"""The clip coefficient of a fused optimizer that steps later in a round than another."""

from __future__ import annotations

from typing import Any
from weakref import ref

from torch import Tensor
from torch.optim import Optimizer

from torchclip._core import gather, mesh
from torchclip._core.batch import Norm
from torchclip.clipper.optimizers import parameters_of
from torchclip.clipper.step import Member, Outcome


def can_be_deferred(optimizer: Optimizer) -> bool:
    """Whether autograd itself accumulates the gradients; for DTensors FSDP2 does so."""
    return not mesh.any_dtensor(parameters_of(optimizer))


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
