"""The loss for the record of the next step."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import ref

from torch import Tensor

from torchclip._core import arguments
from torchclip._core.ranks import meshes
from torchclip.clipper.optimizers import parameters_of
from torchclip.clipper.step import State, Step


class PendingLoss:
    """The loss of the next step, until its record is made.

    The losses of several backward passes of one step are added.  If a GradScaler skips a step, no hook of its
    optimizer runs, and there is no record.  When the next step's loss is assigned, the gradients have then
    been set to None, or are other objects, so the loss of the skipped step is dropped.

    Args:
        state: from which the hooks take it.
        steps: those of the optimizers with the gradients.
    """

    def __init__(self, state: State, steps: Sequence[Step]) -> None:
        self._state, self._steps = state, steps
        # A parameter and its gradient when a loss was last assigned; None if there was no gradient.
        self._seen: tuple[ref[Tensor], ref[Tensor]] | None = None

    def assign(self, loss: float | Tensor | None) -> None:
        """Set the loss, or add it to the loss of the same step."""
        before = self._state.loss
        added = None if loss is None else _own(loss)
        adds = added is not None and before is not None and not self._was_skipped()
        self._state.loss = before + added if adds else added  # type: ignore[operator]
        self._seen = next(((ref(p), ref(p.grad)) for p in self._parameters() if p.grad is not None), None)

    def _was_skipped(self) -> bool:
        """Whether the gradients from when the loss was assigned are gone, though no step has used it."""
        if self._seen is None:
            parameters = self._parameters()
            # FSDP2 may store the gradients elsewhere until the last backward pass of a step.
            return all(p.grad is None for p in parameters) and not meshes.any_dtensor(parameters)
        parameter, grad = (each() for each in self._seen)
        now = None if parameter is None else parameter.grad
        # A backward pass with `create_graph=True` replaces a gradient to add to it.
        return now is None or (now is not grad and not now.requires_grad)

    def _parameters(self) -> list[Tensor]:
        return parameters_of(*(step.optimizer for step in self._steps))


def _own(loss: float | Tensor) -> float | Tensor:
    """A loss as a number, or as a copied tensor, without waiting."""
    if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_cpu and not loss.is_complex():
        return arguments.full(loss.detach()).reshape(()).clone()  # the user may add to the original in place
    return arguments.number("loss", loss)
