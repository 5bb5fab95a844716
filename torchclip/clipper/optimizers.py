"""What several optimizers hold: parameter groups, parameters, and the scale of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
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
    def parameters(self) -> Sequence[Tensor]:
        """The optimizer's own list of parameters."""
        parameters: Sequence[Tensor] = self.values["params"]
        return parameters

    @property
    def name(self) -> str:
        """The name of the norm of its gradients."""
        return f"optimizer {self.optimizer}, group {self.number}" if self.several else f"group {self.number}"

    def place(self, key: str) -> str:
        """A position in the group, as a user would write it."""
        optimizer = f"optimizers[{self.optimizer}]." if self.several else ""
        return f"{optimizer}param_groups[{self.number}][{key!r}]"


def groups_of(optimizers: Sequence[Optimizer]) -> list[Group]:
    """The parameter groups of some optimizers, in order."""
    several = len(optimizers) > 1
    return [
        Group(i, j, several, values)
        for i, optimizer in enumerate(optimizers)
        for j, values in enumerate(optimizer.param_groups)
    ]


def joined(several: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
    """The parameters of several lists, which may be tuples; a single list is not copied."""
    return several[0] if len(several) == 1 else [p for parameters in several for p in parameters]


def parameters_of(*optimizers: Optimizer) -> Sequence[Tensor]:
    """All parameters of some optimizers, group by group; do not change the list."""
    return joined([group["params"] for optimizer in optimizers for group in optimizer.param_groups])


def grad_scale_of(optimizers: Sequence[Optimizer]) -> Tensor | None:
    """The GradScaler's scale by which the gradients are multiplied; those of several must be unscaled."""
    return vars(optimizers[0]).get("grad_scale") if len(optimizers) == 1 else None


def unscaled(norms: Norms, grad_scale: Tensor | None, norm_type: float) -> Norms:
    """The norms of gradients without a GradScaler's scale; order 0 only counts elements."""
    return norms if grad_scale is None or norm_type == 0 else scalars.divided(norms, grad_scale.reshape(1))
