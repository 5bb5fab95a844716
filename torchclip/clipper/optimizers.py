"""What several optimizers hold: parameter groups, parameters, and the scale of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from torchclip._core import scalars
from torchclip._core.batch import Norms


class Group(NamedTuple):
    """A parameter group of one of several optimizers."""

    optimizer: int
    number: int
    several: bool
    """Whether there are several optimizers."""
    values: dict[str, Any]

    @property
    def parameters(self) -> list[Tensor]:
        """The optimizer's list of parameters."""
        parameters: list[Tensor] = self.values["params"]
        return parameters

    @property
    def name(self) -> str:
        """The name of the norm of its gradients."""
        return f"optimizer {self.optimizer}, group {self.number}" if self.several else f"group {self.number}"

    def place(self, key: str) -> str:
        """A position in the group, as a user would write it."""
        optimizer = f"optimizers[{self.optimizer}]." if self.several else ""
        return f"{optimizer}param_groups[{self.number}][{key!r}]"

    def names_of_each(self) -> list[str]:
        """The names of the norms of its single gradients; do not change the list."""
        return _names(self.name, len(self.parameters))


def groups_of(optimizers: Sequence[Optimizer], only: int | None = None) -> list[Group]:
    """The parameter groups of some optimizers, or of a single one of them, in order."""
    several = len(optimizers) > 1
    return [
        Group(i, j, several, values)
        for i, optimizer in enumerate(optimizers)
        if only in (None, i)
        for j, values in enumerate(optimizer.param_groups)
    ]


def parameters_of(*optimizers: Optimizer) -> list[Tensor]:
    """All parameters of some optimizers, group by group."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def grad_scale_of(optimizers: Sequence[Optimizer]) -> Tensor | None:
    """The GradScaler's scale by which the gradients are multiplied; those of several must be unscaled."""
    return getattr(optimizers[0], "grad_scale", None) if len(optimizers) == 1 else None


def unscaled(norms: Norms, grad_scale: Tensor | None, order: float) -> Norms:
    """The norms of gradients without a GradScaler's scale; order 0 only counts elements."""
    return norms if grad_scale is None or order == 0 else scalars.divided(norms, grad_scale.reshape(1))


@cache
def _names(of_all: str, count: int) -> list[str]:
    """The names of a group's parameters; always the same list, which must not be changed."""
    return [f"{of_all}, parameter {i}" for i in range(count)]
