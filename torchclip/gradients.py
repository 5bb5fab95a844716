"""The tensors of one call, and the two primitives over them: norms, and changes in place.

Every clipping rule works on a batch: the CPU kernel's part of it and the rest, which goes through torch
operations, are joined here and nowhere else.
"""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchclip import arguments, eager, kernel
from torchclip.combine import combine

__all__ = [
    "clamp_",
    "norm",
    "norms",
    "of_parameters",
    "of_tensors",
    "pairs",
    "refuse_expanded",
    "scale_",
    "scale_each_",
]

_KERNEL_ORDERS = frozenset({1.0, 2.0, math.inf})
_threads = torch.get_num_threads


def of_parameters(parameters: Tensor | Iterable[Tensor]) -> Any:
    """The distinct gradients of the parameters that have one, in order, as a batch."""
    items = arguments.tensor_iterable("parameters", parameters)
    batch = kernel.Batch(items, "parameters", take_grad=True) if eager.traced() else kernel.gradients(items)
    if batch.count == 0 and isinstance(parameters, types.GeneratorType):
        # Users know the warning from torch: most often the generator was used up before.
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    return batch


def of_tensors(tensors: Tensor | Iterable[Tensor]) -> Any:
    """The distinct tensors of an argument named ``tensors``, in order, as a batch."""
    items = arguments.tensor_iterable("tensors", tensors)
    return kernel.Batch(items, "tensors", take_grad=False) if eager.traced() else kernel.tensors(items)


def pairs(parameters: Tensor | Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The distinct parameters that have a gradient, each with it."""
    items = arguments.tensor_iterable("parameters", parameters)
    distinct = kernel.Batch(items, "parameters", take_grad=False).all
    found = [(p.detach(), p.grad) for p in distinct if p.grad is not None]
    refuse_expanded([grad for _, grad in found])
    return found


def refuse_expanded(tensors: Iterable[Tensor]) -> None:
    """Raise torch's error for tensors whose elements share memory, before anything is written."""
    for tensor in tensors:
        if tensor.layout == torch.strided and any(
            stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        ):
            raise RuntimeError(
                "unsupported operation: more than one element of the written-to tensor refers to a single "
                f"memory location (a gradient of shape {tuple(tensor.shape)} is expanded). Please clone() "
                "the tensor before performing the operation."
            )


def norm(batch: Any, p: float) -> float | Tensor:
    """The norm of the whole batch: a float, or a float64 tensor where a device must not be waited for."""
    rest = batch.rest
    if p not in _KERNEL_ORDERS:
        return eager.norm(batch.all, p)
    if not rest:
        return batch.norm(p, _threads())  # type: ignore[no-any-return]
    of_rest = eager.norm(rest, p)
    if len(rest) == len(batch.all):
        return of_rest
    of_kernel = batch.norm(p, _threads())
    if isinstance(of_rest, Tensor):
        return eager.norm([of_rest, of_rest.new_tensor(of_kernel)], p)
    return combine([of_kernel, of_rest], p)


def norms(batch: Any, p: float) -> list[float | Tensor]:
    """The norm of each tensor of the batch, in order: floats, or float64 tensors as in :func:`norm`."""
    if p not in _KERNEL_ORDERS:
        return eager.norms(batch.all, p)
    of_all: list[float | Tensor | None] = batch.norms(p, _threads())
    of_rest = iter(eager.norms(batch.rest, p))
    return [next(of_rest) if n is None else n for n in of_all]


def scale_(batch: Any, factor: float | Tensor) -> None:
    """Multiply every tensor of the batch in place; by 1.0, which would change nothing, not at all."""
    if isinstance(factor, float) and factor == 1.0:
        return
    if len(batch.rest) < len(batch.all):
        batch.scale(float(factor), _threads())
    if batch.rest:
        eager.scale_(batch.rest, factor)


def scale_each_(batch: Any, factors: Sequence[float | Tensor]) -> None:
    """Multiply each tensor of the batch in place by its own factor; by 1.0 not at all."""
    changes = [None if isinstance(f, float) and f == 1.0 else f for f in factors]
    if len(batch.rest) < len(batch.all):
        batch.scale_each([None if f is None else float(f) for f in changes], _threads())
    if batch.rest:
        of_tensor = {id(t): f for t, f in zip(batch.all, changes, strict=True)}
        for tensor in batch.rest:
            factor = of_tensor[id(tensor)]
            if factor is not None:
                eager.scale_([tensor], factor)


def clamp_(batch: Any, limit: float) -> None:
    """Limit every element of the batch in place to ``[-limit, limit]``."""
    batch.clamp(limit, _threads())
    eager.clamp_(batch.rest, limit)
