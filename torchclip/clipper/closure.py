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
    # The signature shows it by a name such as ``closure``.  Without such a name it can only be the first
    # argument, if that can be called without arguments.
    names = [*inspect.signature(type(args[0]).step).parameters]
    name = next((name for name in names if name.endswith("closure")), None)
    keyword, place = name or "closure", names.index(name) if name else 1
    if callable(kwargs.get(keyword)):
        return args, {**kwargs, keyword: partial(around, kwargs[keyword])}
    if len(args) > place and (callable(args[place]) if name else _is_closure(args[place])):
        return (*args[:place], partial(around, args[place]), *args[place + 1 :]), kwargs
    return None


def _is_closure(value: object) -> bool:
    """Whether a value can be called without arguments; a Module is never called as a closure."""
    if isinstance(value, nn.Module) or not callable(value):
        return False
    try:
        inspect.signature(value).bind()
    except (TypeError, ValueError):
        return False
    return True
