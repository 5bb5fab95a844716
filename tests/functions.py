"""The table of the public functions: what each takes, its NumPy twin, and torch's function of the same name.

A new function needs a row here; the tests of what all of them promise then include it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import torchclip
from torchclip import reference
from torchclip.reference import Array


@dataclass(frozen=True)
class Function:
    """A public function.

    Attributes:
        name: of the function.
        limit: the argument that says what to clip to; None if it only measures.
        takes: its first argument: ``parameters``, ``tensors`` or, with a first axis of examples, ``grads``.
        given: a number for each further argument that has no default.
        numbers: all arguments that are numbers of at least 0.
        orders: whether norms of other orders than 2 make a difference.
        twin: the NumPy twin, called with weights, gradients, limit and order.
        of_torch: whether torch has it.
    """

    name: str
    limit: str | None
    twin: Callable[..., Any]
    takes: str = "parameters"
    given: Mapping[str, float] = field(default_factory=dict)
    numbers: tuple[str, ...] = ()
    orders: bool = True
    of_torch: bool = False

    def __call__(self, first: Any, **arguments: Any) -> Any:
        """Call it with its own first argument; required numbers that are not passed get a default."""
        return getattr(torchclip, self.name)(first, **{**self.given, **arguments})

    def of(self, parameters: Sequence[Any], **arguments: Any) -> Any:
        """Call it with parameters, converted to its first argument."""
        first: Any = parameters
        if self.takes != "parameters":
            first = [p.grad for p in parameters if p.grad is not None]
        if self.takes == "grads":
            first = [grad.view(1, -1) for grad in first]
        return self(first, **arguments)

    @property
    def changes(self) -> bool:
        """Whether it changes gradients."""
        return self.takes == "parameters"

    @property
    def takes_order(self) -> bool:
        """Whether it takes ``norm_type``."""
        return self.orders and "total_norm" not in self.numbers

    def ours(self, parameters: Sequence[Any], limit: float, order: float | str) -> Any:
        """Call it for parameters, with a limit and an order where it takes them."""
        return self._clip(torchclip, parameters, limit, order)

    @property
    def torchs(self) -> Callable[..., Any] | None:
        """Torch's function, called as :meth:`ours`."""
        return (lambda *arguments: self._clip(nn.utils, *arguments)) if self.of_torch else None

    def _clip(self, module: Any, parameters: Sequence[Any], limit: float, order: float | str) -> Any:
        grads = [p.grad for p in parameters if p.grad is not None]
        arguments: dict[str, Any] = {} if self.limit is None else {self.limit: limit}
        if self.takes_order:
            arguments["norm_type"] = order
        if "total_norm" in self.numbers:
            arguments["total_norm"] = module.get_total_norm(grads, order)
        return getattr(module, self.name)(grads if self.takes == "tensors" else parameters, **arguments)


def _twin_with_norm(
    weights: Sequence[Array], grads: Sequence[Array], limit: float, order: float | str
) -> None:
    reference.clip_grads_with_norm(grads, limit, reference.global_norm(grads, order))


_ALL = [
    Function(
        "get_total_norm",
        None,
        lambda weights, grads, limit, order: reference.global_norm(grads, order),
        takes="tensors",
        of_torch=True,
    ),
    Function(
        "clip_grad_norm_",
        "max_norm",
        lambda weights, grads, limit, order: reference.clip_grads(grads, limit, order),
        given={"max_norm": 0.5},
        numbers=("max_norm",),
        of_torch=True,
    ),
    Function(
        "clip_grads_with_norm_",
        "max_norm",
        _twin_with_norm,
        given={"max_norm": 0.5, "total_norm": 5.0},
        numbers=("max_norm", "total_norm"),
        of_torch=True,
    ),
    Function(
        "clip_grad_value_",
        "clip_value",
        lambda weights, grads, limit, order: reference.clip_grad_value(grads, limit),
        given={"clip_value": 0.5},
        numbers=("clip_value",),
        orders=False,
        of_torch=True,
    ),
    Function(
        "clip_grad_norm_per_parameter_",
        "max_norm",
        lambda weights, grads, limit, order: reference.clip_grad_norm_per_parameter(grads, limit, order),
        given={"max_norm": 0.5},
        numbers=("max_norm",),
    ),
    Function(
        "clip_grad_rms_",
        "max_rms",
        lambda weights, grads, limit, order: reference.clip_grad_rms(grads, limit),
        given={"max_rms": 0.5},
        numbers=("max_rms",),
        orders=False,
    ),
    Function(
        "clip_grad_adaptive_",
        "clip_factor",
        lambda weights, grads, limit, order: reference.clip_grad_adaptive(weights, grads, limit, 1e-3, order),
        numbers=("clip_factor", "eps"),
    ),
    Function(
        "clip_per_example",
        "max_norm",
        lambda weights, grads, limit, order: reference.clip_per_example(grads, limit),
        takes="grads",
        given={"max_norm": 0.5},
        numbers=("max_norm",),
        orders=False,
    ),
]
FUNCTIONS = {function.name: function for function in _ALL}
CLIPPERS = {name: f for name, f in FUNCTIONS.items() if f.takes != "grads"}
CHANGING = {name: f for name, f in FUNCTIONS.items() if f.changes}
