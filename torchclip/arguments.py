"""Checks of what users pass in, before anything is modified."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["as_gradients", "as_tensors", "norm_order", "threshold"]


def threshold(name: str, value: Any) -> float:
    """``value`` as a float that is at least 0 (``inf`` included), or an error that names the argument."""
    if type(value) is not float:
        value = _number(name, value)
    if not value >= 0:
        raise ValueError(f"`{name}` must be at least 0, got {value}")
    return float(value)


def norm_order(norm_type: Any) -> float:
    """The order of a norm: any number but NaN, or ``"inf"`` or ``"-inf"``."""
    if norm_type in ("inf", "-inf"):
        return float(norm_type)
    order = norm_type if type(norm_type) is float else _number("norm_type", norm_type, " or 'inf'")
    if math.isnan(order):
        raise ValueError("`norm_type` is nan; pass a number such as 2.0, or 'inf'")
    return order


def _number(name: str, value: Any, alternative: str = "") -> float:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    # Real covers int, float, bool and NumPy's scalars; a bool is a slip of the pen here.
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    hint = "; to measure without clipping pass float('inf')" if name == "max_norm" else ""
    raise TypeError(f"`{name}` must be a number{alternative}, got {_shown(value)}{hint}")


def as_tensors(name: str, tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The tensors of an argument, each once, in order."""
    if isinstance(tensors, Tensor):
        return [tensors]
    if isinstance(tensors, nn.Module):
        raise TypeError(f"`{name}` is a Module ({type(tensors).__name__}); pass its `.parameters()`")
    if isinstance(tensors, torch.optim.Optimizer):
        raise TypeError(
            f"`{name}` is an optimizer ({type(tensors).__name__}); pass the model's `.parameters()`, "
            "or attach a torchclip.Clipper to the optimizer"
        )
    if isinstance(tensors, (Mapping, str, bytes)) or not isinstance(tensors, Iterable):
        raise TypeError(f"`{name}` must be a tensor or an iterable of tensors, got {_shown(tensors)}")
    distinct: dict[int, Tensor] = {}
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            hint = "; pass `.parameters()`, not `.named_parameters()`" if isinstance(tensor, tuple) else ""
            raise TypeError(f"`{name}` must hold tensors only, item {i} is {_shown(tensor)}{hint}")
        distinct[id(tensor)] = tensor
    if not distinct and isinstance(tensors, types.GeneratorType):
        # Users know this warning, and its cause (a generator that was used up before), from torch.
        warnings.warn(
            f"`{name}` is an empty generator, no gradient clipping will occur.",
            stacklevel=_frames_to_the_caller(),
        )
    return list(distinct.values())


def as_gradients(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The gradients of the parameters that have one, each once, in order."""
    grads = {id(p.grad): p.grad for p in as_tensors("parameters", parameters) if p.grad is not None}
    return list(grads.values())
