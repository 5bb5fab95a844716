"""The optimizers of a Clipper: which may be passed, and the parameters and groups that they hold."""

from __future__ import annotations

from collections.abc import Container, MutableMapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from torchclip._core import arguments, scalars
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


# What a user passes


def optimizers_of(given: Any, taken: Container[Optimizer]) -> list[Optimizer]:
    """The optimizers that a user passes, or an error that says what to pass.

    Args:
        given: an optimizer, or a list or tuple of them.
        taken: the optimizers that already have a Clipper.
    """
    optimizers = list(given) if isinstance(given, (list, tuple)) else [given]
    if not optimizers:
        raise ValueError("`optimizer` is an empty list; pass an optimizer, or those that step together")
    for i, optimizer in enumerate(optimizers):
        name = "`optimizer`" if optimizer is given else f"`optimizer` (item {i} of the list)"
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"{name} must be a torch.optim.Optimizer, or a list of those that step together, got "
                f"{arguments.shown(optimizer)}; pass neither a model nor parameters nor param_groups. For a "
                "wrapper, pass the optimizer that it wraps; for a dictionary, list(optimizers.values())"
            )
        if not takes_hooks(optimizer) or not isinstance(optimizer.state, MutableMapping):
            raise TypeError(
                f"{name} is a wrapper without hooks ({type(optimizer).__name__}); pass the optimizer "
                "that it wraps"
            )
        if optimizer in taken:
            raise ValueError(f"{name} already has a Clipper; call its detach() first")
        if any(optimizer is other for other in optimizers[:i]):
            raise ValueError(f"{name} is in the list twice; pass each optimizer once")
    return optimizers


def takes_hooks(optimizer: Optimizer) -> bool:
    """Whether an optimizer can have hooks, which most wrappers of optimizers cannot."""
    try:
        optimizer.register_step_pre_hook(lambda *_: None).remove()
    except (AttributeError, TypeError):
        return False
    return True
