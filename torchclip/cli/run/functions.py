"""Records what calls of clipping functions do, and changes their thresholds in a trial."""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

import torchclip
from torchclip import patch
from torchclip._core import scalars
from torchclip.cli.run.calls import Call, Calls, site_of_caller
from torchclip.cli.run.gradients import as_number, nonfinite_ids, norm_of
from torchclip.cli.run.losses import LossRecorder
from torchclip.cli.run.trial import Effect, Trial

_BY_NORM = ("clip_grad_norm_", "clip_grads_with_norm_")
_OTHERS = ("clip_grad_value_", "clip_grad_adaptive_", "clip_grad_norm_per_parameter_", "clip_grad_rms_")

own = types.SimpleNamespace()
"""Stand-ins for torchclip's functions that a program calls by their own names, where pickle finds them."""


class FunctionRecorder:
    """Observes torch's functions as ``torchclip.install`` has installed them, and torchclip's own.

    No call waits for an accelerator, except in a trial of a threshold that learns.  Calls inside a function
    under ``torch.compile`` are not recorded; a trial lets them only measure.
    """

    def __init__(self, calls: Calls, losses: LossRecorder, trial: Trial) -> None:
        self._calls, self._losses, self._trial = calls, losses, trial
        self._signatures = {
            name: inspect.signature(getattr(torchclip, name)) for name in (*_BY_NORM, *_OTHERS)
        }

    def attach(self, stack: ExitStack) -> None:
        """Record until the stack is closed."""
        stack.callback(patch.observe(self._called))
        for name in self._signatures:
            ours = getattr(torchclip, name)
            vars(own)[name] = _function(self._called, ours)
            setattr(torchclip, name, vars(own)[name])
            stack.callback(setattr, torchclip, name, ours)

    def _called(self, ours: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        name = ours.__name__
        if torch.compiler.is_compiling():
            return self._compiled(ours, *args, **kwargs)
        if name not in self._signatures:  # get_total_norm changes nothing
            return ours(*args, **kwargs)
        try:
            bound = self._signatures[name].bind(*args, **kwargs)
        except TypeError:
            return ours(*args, **kwargs)  # which raises the error that a program expects
        first = next(iter(bound.arguments))
        given = bound.arguments[first]
        bound.arguments[first], items = _listed(given)
        call = self._new_call(name, items, isinstance(given, Iterator) and not items)
        # What only measures stays so in a trial.
        if self._trial.replaces and bound.arguments.get("max_norm") != math.inf:
            result = self._tried(call, ours, bound, items)
        elif name in _BY_NORM:
            result = self._by_norm(call, ours, bound, items)
        else:
            result = _otherwise(call, ours, bound, items)
        call.mark(items)
        self._calls.add(call)
        return result

    def _compiled(self, ours: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._trial.replaces or ours.__name__ not in (*_BY_NORM, *_OTHERS):
            return ours(*args, **kwargs)
        return _measured(ours, *args, **kwargs) if ours.__name__ == "clip_grad_norm_" else None

    def _new_call(self, name: str, items: list[Tensor], is_used_up: bool) -> Call:
        return Call(
            site_of_caller(),
            name,
            frozenset(map(id, items)),
            is_used_up,
            self._losses.backwards,
            self._losses.unscaled(),
            self._losses.updates,
            Effect(0.0, math.inf, 1.0),
        )

    def _tried(
        self, call: Call, ours: Callable[..., Any], bound: inspect.BoundArguments, items: list[Tensor]
    ) -> Any:
        """Clip as the trial says, in place of what the program asked for."""
        self._trial.replaced[call.function] += 1
        result = None
        if call.function in ("clip_grad_norm_", "clip_grad_norm_per_parameter_"):
            result = _measured(ours, *bound.args, **bound.kwargs)
        given = result if call.function == "clip_grad_norm_" else bound.arguments.get("total_norm")
        norm = norm_of(items) if given is None else as_number(given)
        call.effect = self._trial.clip((call.site, call.parameters), items, norm)
        return result

    def _by_norm(
        self, call: Call, ours: Callable[..., Any], bound: inspect.BoundArguments, items: list[Tensor]
    ) -> Any:
        """Clip by norm, and find which gradients are not finite before they are all NaN."""
        bad: list[int] = []
        given = bound.arguments.get("total_norm")
        if given is None and _can_be_read(items) and not bound.arguments.get("error_if_nonfinite"):
            # The function refuses them before it multiplies any by NaN.
            bound.arguments["error_if_nonfinite"] = True
            try:
                result = ours(*bound.args, **bound.kwargs)
            except RuntimeError:
                bad = nonfinite_ids(items)
                bound.arguments["error_if_nonfinite"] = False
                result = ours(*bound.args, **bound.kwargs)
        else:
            if given is not None and _can_be_read(items) and not math.isfinite(given):
                bad = nonfinite_ids(items)
            result = ours(*bound.args, **bound.kwargs)
        norm, max_norm = as_number(result if given is None else given), float(bound.arguments["max_norm"])
        call.effect, call.nonfinite = Effect(norm, max_norm, scalars.clip_coef(max_norm, norm)), bad
        return result


def _otherwise(
    call: Call, ours: Callable[..., Any], bound: inspect.BoundArguments, items: list[Tensor]
) -> Any:
    """Clip by another rule; the ratio of the norms after and before is the coefficient."""
    before = norm_of(items)
    result = ours(*bound.args, **bound.kwargs)
    after = norm_of(items)
    ratio = after / before if isinstance(before, Tensor) or before else 1.0
    bad = nonfinite_ids(items) if isinstance(before, float) and not math.isfinite(before) else []
    call.effect, call.nonfinite = Effect(before, math.inf, ratio), bad
    return result


def _function(called: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """A function like one of torchclip's that is observed."""

    @functools.wraps(ours)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return called(ours, *args, **kwargs)

    stand_in.__module__, stand_in.__qualname__ = __name__, f"own.{ours.__name__}"
    return stand_in


def _measured(function: Callable[..., Any], parameters: Any, max_norm: Any, *args: Any, **kwargs: Any) -> Any:
    """What a function by norm returns, without clipping."""
    return function(parameters, math.inf, *args, **kwargs)


def _listed(parameters: Any) -> tuple[Any, list[Tensor]]:
    """The argument to pass on, and the parameters, which a program may pass as an iterator."""
    if isinstance(parameters, Tensor):
        return parameters, [parameters]
    if isinstance(parameters, nn.Module):
        return parameters, list(parameters.parameters())
    if not isinstance(parameters, Iterable):
        return parameters, []
    items = list(parameters)
    # Empty generators give a warning, and anything but tensors an error, as usual.
    walked = isinstance(parameters, Iterator) and items
    return items if walked else parameters, [item for item in items if isinstance(item, Tensor)]


def _can_be_read(items: list[Tensor]) -> bool:
    """Whether a value can be read without waiting for an accelerator or other ranks."""
    return all(type(p.grad) is Tensor and p.grad.is_cpu for p in items[:1] if p.grad is not None)
