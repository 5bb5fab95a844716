"""Checks of what users pass in, before anything is modified."""

from __future__ import annotations

import inspect
import math
import operator
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

T = TypeVar("T")


def threshold(name: str, value: Any) -> float:
    """``value`` as a float that is at least 0 (``inf`` included), or an error that names the argument."""
    if type(value) is not float:
        hint = "; to measure without clipping pass float('inf')" if name == "max_norm" else ""
        value = number(name, value, hint=hint, text=True)
    if not value >= 0:
        raise ValueError(f"`{name}` must be at least 0, got {shown(value)}")
    return float(value)


def norm_type_of(norm_type: Any) -> float:
    """The order of a norm: any number but NaN, or ``"inf"`` or ``"-inf"``."""
    if type(norm_type) is not float:
        norm_type = number("norm_type", norm_type, "a number or 'inf'", text=True)
    if norm_type != norm_type:  # NaN; math.isnan could not be traced
        raise ValueError("`norm_type` is nan; pass a number such as 2.0, or 'inf'")
    return float(norm_type)


def number(name: str, value: Any, what: str = "a number", hint: str = "", text: bool = False) -> float:
    """``value`` as a float, or an error that names the argument.

    With ``text``, a string that ``float`` reads is allowed: configuration files have them, and torch takes
    them.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        if value.is_meta:
            raise TypeError(
                f"`{name}` must be {what}, got a tensor on the device 'meta', which has no value{hint}"
            )
        return float(full(value.detach()))
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if _is_number(value) or (text and isinstance(value, str)):
        try:
            result = float(value)
            if not (isinstance(value, str) and math.isnan(result)):
                return result
        except OverflowError:
            kind = type(value).__name__
            raise ValueError(f"`{name}` must be within the range of float64, got a larger {kind}") from None
        except (TypeError, ValueError):
            pass  # a string that is no number, or an array of several, is refused like anything else
    raise TypeError(f"`{name}` must be {what}, got {shown(value)}{hint}")


def _is_number(value: Any) -> bool:
    """Whether ``float`` takes a value, as torch does; but a bool is never meant as a number."""
    kind = type(value)
    takes = hasattr(kind, "__float__") or hasattr(kind, "__index__")
    return takes and not isinstance(value, (bool, np.bool_, Tensor))


def full(tensor: Tensor) -> Tensor:
    """The tensor; of a DTensor, which may be pending a reduction, the full one."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def count(name: str, value: Any, least: float) -> int:
    """``value`` as an integer that is at least ``least``, or an error that names the argument."""
    try:
        integer = operator.index(value)
    except TypeError:  # tensors and arrays of several elements raise it; those of one integer have an index
        integer = None
    if integer is None or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer, got {shown(value)}")
    if integer < least:
        raise ValueError(f"`{name}` must be at least {least}, got {shown(value)}")
    return integer


def flag(name: str, value: Any) -> bool:
    """``value`` as a truth value, or an error that names the argument."""
    if isinstance(value, bool):
        return value
    if isinstance(value, np.bool_) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise TypeError(f"`{name}` must be True or False, got {shown(value)}")


def option(name: str, value: Any, options: tuple[Any, ...]) -> Any:
    """``value``, if it is one of the allowed strings, or an error that lists these."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, options))}, got {shown(value)}")
    return value


def saved(name: str, value: Any, keys: Iterable[str], kind: str) -> None:
    """Raise an error for a saved state, or a part of it, that is not a dictionary or lacks a key."""
    remedy = f"pass what {kind}.state_dict() returned"
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` must be a dictionary, got {shown(value)}; {remedy}")
    missing = [key for key in keys if key not in value]
    if missing:
        raise ValueError(f"`{name}` lacks {', '.join(map(repr, missing))}; {remedy}")


def items(name: str, values: Any, check: Callable[[str, Any], T]) -> list[T]:
    """A list whose items another function has checked, or an error that names the list."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"`{name}` must be a list, got {shown(values)}")
    return [check(name, value) for value in values]


def string(name: str, value: Any) -> str:
    """``value``, an item of a list, if it is a string, or an error that names the list."""
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must hold strings, got {shown(value)}")
    return value


def tensor_list(name: str, tensors: Any) -> list[Tensor]:
    """``tensors`` as a list, a single tensor as a list of itself, or an error that says what to pass.

    A module means its ``parameters()``.  The items are not checked here.
    """
    if type(tensors) is list:
        return tensors
    if isinstance(tensors, Tensor):
        return [tensors]
    if isinstance(tensors, nn.Module) and not isinstance(tensors, nn.ParameterList):
        if name == "parameters":
            return list(tensors.parameters())
        raise TypeError(f"`{name}` is a module ({type(tensors).__name__}); pass its `.parameters()`")
    if isinstance(tensors, torch.optim.Optimizer):
        raise TypeError(
            f"`{name}` is an optimizer ({type(tensors).__name__}); pass the model's `.parameters()`, "
            "or attach a torchclip.Clipper to the optimizer"
        )
    # An object with numbered items is iterable too, even if it does not say so.
    iterable = isinstance(tensors, Iterable) or hasattr(type(tensors), "__getitem__")
    if isinstance(tensors, (Mapping, str, bytes, np.ndarray)) or not iterable:
        remedy = _remedy(tensors)
        raise TypeError(f"`{name}` must be a tensor or an iterable of tensors, got {shown(tensors)}{remedy}")
    return list(tensors)


def names_of(parameters: Any) -> dict[int, str]:
    """What to call the gradients in errors, by their ``id``: only parameters of a module have names."""
    if not isinstance(parameters, nn.Module):
        return {}
    return {id(p.grad): f"{name!r}" for name, p in parameters.named_parameters() if p.grad is not None}


def check_tensor(name: str, index: int, item: Any) -> None:
    """Raise an error for an item that is not a tensor."""
    if isinstance(item, Tensor):
        return
    raise TypeError(f"`{name}` must hold tensors only, item {index} is {shown(item)}{_remedy(item)}")


def _remedy(given: Any) -> str:
    """What to pass in place of what is no tensor, if that is clear."""
    if isinstance(given, Mapping):
        return f"; pass its {'`params`' if 'params' in given else 'values'}"
    if isinstance(given, tuple):
        return "; pass `.parameters()`, not `.named_parameters()`"
    if isinstance(given, (list, Iterator)):
        return "; pass all tensors in one list"
    if isinstance(given, nn.Module):
        return "; pass its `.parameters()`"
    return "; call it" if inspect.ismethod(given) else ""


def shown(value: Any) -> str:
    """A value in an error message: its ``repr``, shortened and on one line, and its type."""
    return f"{' '.join(reprlib.repr(value).split())} ({type(value).__name__})"


def some(texts: Sequence[str], most: int, between: str = ", ") -> str:
    """The first of several texts, and how many more there are."""
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return between.join(texts[:most]) + more


def level_of_caller() -> int:
    """The ``stacklevel`` that shows the line where a user called a clipping function."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(
        ("torch.", "torchclip.")
    ):
        frame, level = frame.f_back, level + 1
    return level
