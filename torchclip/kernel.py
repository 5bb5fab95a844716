"""The compiled CPU kernel: loading it, and what stands in for it where it cannot be used.

The kernel gathers the tensors of a call into a ``Batch``, which knows those that it can work on and keeps the
others in ``rest``, for ``torchclip._core.eager``.  Without the kernel a ``Batch`` takes nothing, and all of
its tensors are the rest: the callers need not know which of the two they have.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from torchclip._core import arguments, eager
from torchclip._core.combine import ABSENT

if TYPE_CHECKING:
    from torchclip import _kernel

__all__ = ["AnyBatch", "Batch", "disabled", "gradients", "scalar", "status", "tensors"]

_extension: Any
_reason: str
AnyBatch: TypeAlias = "Batch | _kernel.Batch"
gradients: Callable[[Iterable[Tensor]], AnyBatch]
"""A batch of the gradients of the parameters that have one."""
tensors: Callable[[Iterable[Tensor]], AnyBatch]
"""A batch of the tensors themselves."""
scalar: Callable[[float, bool], Tensor]
"""A 0-dim CPU tensor of a value, float64 (True) or float32."""

_FLOAT32_MAX = torch.finfo(torch.float32).max
_PLAIN = {Tensor, nn.Parameter}


class Batch:
    """The distinct tensors of one call, in order, none of them for the kernel.

    Twin of the kernel's own ``Batch``; ``_kernel.pyi`` says what the methods do there.

    Args:
        items: parameters or tensors; anything else among them is refused.
        name: the argument that they come from, for the error message.
        take_grad: whether the gradients of the items are meant; those without one are passed over.

    Attributes:
        all: the tensors.
        count: how many items there were.
        subclassed: whether any item is of a subclass of Tensor other than Parameter.
        facts: of what the kernel takes.
    """

    __slots__ = ("all", "count", "subclassed")
    facts = 0

    def __init__(self, items: Iterable[Tensor], name: str, take_grad: bool) -> None:
        items = list(items)
        kinds = set(map(type, items))
        if not kinds <= _PLAIN:
            for i, item in enumerate(items):
                if not isinstance(item, Tensor):
                    arguments.refuse_item(name, i, item)
        self.count = len(items)
        self.subclassed = not kinds <= _PLAIN
        tensors = [item.grad for item in items] if take_grad else items
        self.all = list({id(t): t for t in tensors if t is not None}.values())

    @property
    def rest(self) -> list[Tensor]:
        """The tensors that the kernel does not take: here, all."""
        return self.all

    def norm(self, p: float, finite: bool = False) -> float:
        """The norm of nothing."""
        return ABSENT

    def norms(self, p: float, finite: bool = False) -> list[float]:
        """No norm for any tensor."""
        return [ABSENT] * len(self.all)

    def scale_(self, clip_coef: float) -> None:
        """Scales nothing."""

    def scale_each_(self, clip_coefs: Sequence[float]) -> None:
        """Scales nothing."""

    def clamp_(self, limit: float) -> None:
        """Clamps nothing."""


def _gradients(parameters: Iterable[Tensor]) -> Batch:
    return Batch(parameters, "parameters", take_grad=True)


def _tensors(items: Iterable[Tensor]) -> Batch:
    return Batch(items, "tensors", take_grad=False)


def _scalar(value: float, double: bool) -> Tensor:
    in_range = double or value <= _FLOAT32_MAX or math.isnan(value)
    dtype = torch.float64 if double else torch.float32
    return torch.scalar_tensor(value if in_range else math.inf, dtype=dtype, device="cpu")


def _other_norms(tensors: list[Tensor], p: float, finite: bool, each: bool) -> Any:
    """Norms of orders that the kernel has no loops for."""
    if finite:
        tensors = [tensor.detach().clone() for tensor in tensors]
        eager.zero_nonfinite_(tensors)
    return eager.norms(tensors, p) if each else eager.norm(tensors, p)


def _use(extension: Any, reason: str) -> None:
    """Let the module's functions be those of the extension, or without one, for a reason, their twins."""
    global _extension, _reason, gradients, tensors, scalar
    _extension, _reason = extension, reason
    if extension is None:
        gradients, tensors, scalar = _gradients, _tensors, _scalar
    else:
        gradients, tensors, scalar = extension.gradients, extension.tensors, extension.scalar


def status() -> str:
    """One line on whether the kernel is active, and why not if it is not."""
    if _extension is None:
        return _reason
    # Outside of Linux there is no OpenMP that could be shared with torch.
    return f"active ({_extension.instruction_set()}{'' if _extension.openmp else ', one thread'})"


@contextmanager
def disabled() -> Iterator[None]:
    """Everything through torch operations, to compare the kernel with."""
    before = _extension, _reason
    _use(None, "off (torchclip.kernel.disabled())")
    try:
        yield
    finally:
        _use(*before)


def _load() -> tuple[Any, str]:
    """The extension, or None and the reason why it is not there."""
    if os.environ.get("TORCHCLIP_KERNEL") == "0":
        return None, "off (TORCHCLIP_KERNEL=0)"
    exchange_api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exchange_api is None:
        return None, f"off (torch {torch.__version__} has no DLPack exchange table; a newer one has)"
    try:
        _kernel = importlib.import_module("torchclip._kernel")
    except ImportError as error:
        return None, f"off (the extension was not built or cannot be loaded: {error})"
    try:
        _kernel.connect(
            Tensor,
            nn.Parameter,
            exchange_api,
            torch._C._increment_version,
            arguments.refuse_item,
            torch.get_num_threads,
            _other_norms,
        )
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        return None, f"off (torch {torch.__version__} does not fit: {error})"
    return _kernel, ""


_use(*_load())
