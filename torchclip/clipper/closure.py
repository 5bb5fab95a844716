"""What the arguments of an optimizer's ``step()`` say: a closure, or that the step is none of training's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from torchclip._core.batch import Norm


def creates_state(
    optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any], total_norm: Callable[[], Norm]
) -> bool:
    """Whether a step is no training step, but makes the optimizer create its state.

    ``torch.distributed.checkpoint.state_dict`` and others take such a step if an optimizer has no state yet:
    they pass None as the closure, all gradients are 0, and so is the learning rate, if there is one.  Such a
    step changes nothing.  Cheap checks come first, and are nearly always enough, as reading the norm may wait
    for it.
    """
    says_no_closure = args[1] is None if len(args) > 1 else kwargs.get("closure", ...) is None
    return (
        says_no_closure
        and not any(optimizer.state.values())
        and all(float(group.get("lr", 0.0)) == 0.0 for group in optimizer.param_groups)
        and bool(total_norm() <= 0.0)
    )


def with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], around: Callable[..., Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of an optimizer's step with its closure wrapped; None if there is none.

    Args:
        args: its arguments, the optimizer first.
        kwargs: its keyword arguments.
        around: is called in place of the closure, with the closure as its first argument.
    """
    where = _closure_argument(type(args[0]).step, args, kwargs)
    if isinstance(where, str):
        return args, {**kwargs, where: partial(around, kwargs[where])}
    if where is not None:
        return (*args[:where], partial(around, args[where]), *args[where + 1 :]), kwargs
    return None


def _closure_argument(
    step: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> int | str | None:
    """The position or the name of the closure among the arguments; None if there is none.

    The signature shows it by a name such as ``closure``.  Without such a name it can only be the first
    argument, if that can be called without arguments; a Module, which is callable too, is not a closure.
    """
    names = [*inspect.signature(step).parameters]
    name = next((name for name in names if name.endswith("closure")), "closure")
    if callable(kwargs.get(name)):
        return name
    if name in names:
        place = names.index(name)
        return place if len(args) > place and callable(args[place]) else None
    return 1 if len(args) > 1 and _is_closure(args[1]) else None


def _is_closure(value: object) -> bool:
    if isinstance(value, nn.Module) or not callable(value):
        return False
    try:
        inspect.signature(value).bind()
    except (TypeError, ValueError):
        return False
    return True
