"""How far a step moves each parameter: the weights before it are copied, and compared with those after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchclip._core import gather
from torchclip._core.batch import Norms
from torchclip.clipper.names import Names
from torchclip.clipper.optimizers import parameters_of
from torchclip.clipper.step import Outcome, Step


class Moved(NamedTuple):
    """How far the parameters of one optimizer moved in a step: their names, and two norms of each."""

    names: list[str]
    weights: Norms
    """Of the weights before the step."""
    changes: Norms
    """Of what the step added to them."""


class WeightsBefore:
    """The weights of an optimizer before its step; nothing here refers to a parameter.

    Args:
        step: the optimizer's step, which is about to begin.  If it fails, the copies are dropped.
    """

    def __init__(self, step: Step) -> None:
        parameters = gather.distinct(parameters_of(step.optimizer))
        self._ids = list(map(id, parameters))
        self._copies: list[Tensor] = []
        step.undo_at_end(self._drop_if_failed)
        with torch.no_grad():
            self._copies += [p.detach().clone() for p in parameters]

    def _drop_if_failed(self, outcome: Outcome) -> None:
        if outcome == "failed":
            self._copies = []

    def moved(self, step: Step, names: Names, optimizers: Sequence[Optimizer]) -> Moved | None:
        """What the step has done, without waiting for a device; None if it has other parameters now.

        All ranks that have parts of the parameters must call this.
        """
        copies, self._copies = self._copies, []
        parameters = gather.distinct(parameters_of(step.optimizer))
        is_same = [*map(id, parameters)] == self._ids and len(copies) == len(parameters)
        if not is_same or any(p.shape != copy.shape for p, copy in zip(parameters, copies, strict=True)):
            return None
        weights = _norms(copies)
        with torch.no_grad():
            for copy, parameter in zip(copies, parameters, strict=True):
                copy.sub_(parameter.detach())  # in the copy's memory; the norm does not see the sign
        name_of = {id(p): name for name, p in names.named_parameters(optimizers)}
        return Moved([name_of[id(p)] for p in parameters], weights, _norms(copies))


def _norms(tensors: list[Tensor]) -> Norms:
    """The norm of each tensor, of all its parts on other ranks, too."""
    return gather.tensors(tensors).norms(2.0)
