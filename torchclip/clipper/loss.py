"""The loss for the record of the next step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from torchclip._core import arguments, gather
from torchclip._core.ranks import meshes


class _Seen(NamedTuple):
    """The first gradient when a loss was assigned; nothing here refers to it."""

    place: int
    parameter: int
    grad: int
    version: int
    fingerprint: bytes


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
        self._seen: _Seen | None = None

    def assign(self, loss: float | Tensor | None, parameters: Sequence[Tensor]) -> None:
        """Set the loss, or add it to the loss of the same step.

        Args:
            loss: the loss.
            parameters: those with the gradients.
        """
        added = None if loss is None else _own(loss)
        adds = added is not None and self.value is not None and not self._was_skipped(parameters)
        self.value = self.value + added if adds else added  # type: ignore[operator]
        self._seen = next((_seen(i, p) for i, p in enumerate(parameters) if p.grad is not None), None)

    def _was_skipped(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the gradients from when the loss was assigned are gone, though no step has used it."""
        seen = self._seen
        if seen is None:
            # FSDP2 may store the gradients elsewhere until the last backward pass of a step.
            return all(p.grad is None for p in parameters) and not meshes.any_dtensor(parameters)
        if seen.place >= len(parameters) or id(parameters[seen.place]) != seen.parameter:
            return True
        parameter = parameters[seen.place]
        if parameter.grad is None:
            return True
        # A backward pass with `create_graph=True` replaces a gradient to add to it.
        if parameter.grad.requires_grad:
            return False
        now = _seen(seen.place, parameter)
        # A backward pass that adds to the gradient raises its version; another one begins with a low version.
        is_same = now.grad == seen.grad and now.version > seen.version
        return not (is_same or now.fingerprint == seen.fingerprint)


def _seen(place: int, parameter: Tensor) -> _Seen:
    grad = parameter.grad
    assert grad is not None
    return _Seen(place, id(parameter), id(grad), meshes.version_of(grad), gather.fingerprint([parameter]))


def _own(loss: float | Tensor) -> float | Tensor:
    """A loss as a number, or as a copied tensor, without waiting."""
    if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_cpu and not loss.is_complex():
        return arguments.full(loss.detach()).reshape(()).clone()  # the user may add to the original in place
    return arguments.number("loss", loss)
