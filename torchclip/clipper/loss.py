"""The loss for the record of the next step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torchclip._core import arguments, gather
from torchclip._core.ranks import meshes


class PendingLoss:
    """The loss of the next step, until its record is made.

    The losses of several backward passes of one step are added.  If a GradScaler skips a step, no hook of its
    optimizer runs, and there is no record.  When the next step's loss is assigned, the gradients have then
    been set to None, or are other ones, so the loss of the skipped step is dropped.

    Attributes:
        value: the loss; None if none was assigned.
    """

    def __init__(self) -> None:
        self.value: float | Tensor | None = None
        self._seen: tuple[Any, ...] | None = None  # of the first gradient when a loss was assigned

    def assign(self, loss: float | Tensor | None, parameters: Sequence[Tensor]) -> None:
        """Set the loss, or add it to the loss of the same step.

        Args:
            loss: the loss.
            parameters: those with the gradients.
        """
        added = None if loss is None else _own(loss)
        adds = added is not None and self.value is not None and not self._was_skipped(parameters)
        self.value = self.value + added if adds else added  # type: ignore[operator]
        self._seen = next((_seen(p) for p in parameters if p.grad is not None), None)

    def _was_skipped(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the gradients from when the loss was assigned are gone, though no step has used it."""
        if self._seen is None:
            # FSDP2 may store the gradients elsewhere until the last backward pass of a step.
            return all(p.grad is None for p in parameters) and not meshes.any_dtensor(parameters)
        of, grad, version, fingerprint = self._seen
        parameter = next((p for p in parameters if id(p) == of), None)
        if parameter is None or parameter.grad is None:
            return True
        # A backward pass with `create_graph=True` replaces a gradient to add to it.
        if parameter.grad.requires_grad:
            return False
        # A backward pass that adds to the gradient raises its version; another one begins with a low version.
        _, grad_now, version_now, fingerprint_now = _seen(parameter)
        is_same = grad_now == grad and version_now > version
        return not (is_same or fingerprint_now == fingerprint)


def _seen(parameter: Tensor) -> tuple[Any, ...]:
    """What shows later whether a gradient is still the same; nothing in it refers to a tensor."""
    grad: Any = parameter.grad
    return id(parameter), id(grad), meshes.version_of(grad), gather.fingerprint([parameter])


def _own(loss: float | Tensor) -> float | Tensor:
    """A loss as a number, or as a copied tensor, without waiting."""
    if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_cpu and not loss.is_complex():
        return arguments.full(loss.detach()).reshape(()).clone()  # the user may add to the original in place
    return arguments.number("loss", loss)
