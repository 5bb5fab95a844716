"""Records what calls of torch's clipping functions do, and how long they take, while a program runs."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchclip import patch
from torchclip._core.ranks import meshes
from torchclip._core.scalars import clip_coef
from torchclip.cli.run.calls import Call, Calls
from torchclip.cli.run.gradients import nonfinite_ids, norm_of
from torchclip.cli.run.trial import Trial


class FunctionRecorder:
    """Observes the functions that ``torchclip.install`` has installed.

    No call waits for an accelerator; the times do not include work there that continues after a call has
    returned.  Calls inside a function under ``torch.compile`` are not recorded.  If a trial replaces the
    program's clipping, the functions only measure.

    Attributes:
        calls (Calls): their effects, for the optimizers that step next.
        counts (Counter[str]): the calls of each function, by its name.
        seconds (dict[str, float]): how long all calls took on the host, by function.
    """

    def __init__(self, calls: Calls, trial: Trial) -> None:
        self.calls = calls
        self.counts: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self._trial = trial

    def attach(self) -> None:
        """Record from now on."""
        self._detach = patch.observe(self._called)

    def detach(self) -> None:
        """Stop recording."""
        self._detach()

    def _called(self, ours: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        name, is_compiling = ours.__name__, torch.compiler.is_compiling()
        if self._trial.replaces and name != "get_total_norm":
            if not is_compiling:
                self._trial.replaced[name] += 1
            return _measured(ours, *args, **kwargs) if name == "clip_grad_norm_" else None
        if is_compiling:
            return ours(*args, **kwargs)
        recorded = {
            "clip_grad_norm_": self._clip_grad_norm,
            "clip_grads_with_norm_": self._clip_grads_with_norm,
            "clip_grad_value_": self._clip_grad_value,
        }
        return recorded.get(name, self._call)(ours, *args, **kwargs)

    # The functions; their arguments have the names that a program may use

    def _clip_grad_norm(
        self, ours: Callable[..., Any], parameters: Any, max_norm: Any, *args: Any, **kwargs: Any
    ) -> Any:
        given, items = _listed(parameters)
        bad: list[int] = []
        raises = kwargs.get("error_if_nonfinite", False)
        if len(args) > 1 or raises or not _can_be_read(items):
            norm = self._call(ours, given, max_norm, *args, **kwargs)
        else:
            # After a multiplication by NaN, it is too late to see which gradients are not finite.
            strict = {**kwargs, "error_if_nonfinite": True}
            try:
                norm = self._call(ours, given, max_norm, *args, **strict)
            except RuntimeError:
                bad = nonfinite_ids(items)
                if self._trial.nonfinite is not None:  # its Clipper needs the original gradients
                    max_norm = math.inf
                norm = ours(given, max_norm, *args, **kwargs)
        self._keep("clip_grad_norm_", items, max_norm, norm, bad)
        return norm

    def _clip_grads_with_norm(
        self,
        ours: Callable[..., Any],
        parameters: Any,
        max_norm: Any,
        total_norm: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        given, items = _listed(parameters)
        bad = nonfinite_ids(items) if _is_bad(total_norm) and _can_be_read(items) else []
        self._call(ours, given, max_norm, total_norm, *args, **kwargs)
        self._keep("clip_grads_with_norm_", items, max_norm, total_norm, bad)

    def _clip_grad_value(
        self, ours: Callable[..., Any], parameters: Any, clip_value: Any, *args: Any, **kwargs: Any
    ) -> None:
        given, items = _listed(parameters)
        before = norm_of(items)
        self._call(ours, given, clip_value, *args, **kwargs)
        after = norm_of(items)
        if before is not None and after is not None:
            bad = nonfinite_ids(items) if _is_bad(before) else []
            clip_coef = after / before if isinstance(before, Tensor) or before else 1.0
            self.calls.add(items, Call("clip_grad_value_", before, math.inf, clip_coef, bad))

    def _call(self, ours: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call torchclip's function, and measure the time."""
        name, start = ours.__name__, time.perf_counter()
        self.counts[name] += 1
        try:
            return ours(*args, **kwargs)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def _keep(self, name: str, items: list[Tensor], max_norm: Any, total_norm: Any, bad: list[int]) -> None:
        """Keep a call for the optimizers that step next, without waiting for an accelerator."""
        if isinstance(total_norm, Tensor):
            if meshes.is_dtensor(total_norm) and all(p.is_replicate() for p in total_norm.placements):
                total_norm = total_norm.to_local()
            if type(total_norm) is not Tensor:
                return
            total_norm = float(total_norm) if total_norm.is_cpu else total_norm.detach()
        max_norm = float(max_norm)
        self.calls.add(items, Call(name, total_norm, max_norm, clip_coef(max_norm, total_norm), bad))


def _measured(
    clip_grad_norm_: Callable[..., Any], parameters: Any, max_norm: Any, *args: Any, **kwargs: Any
) -> Any:
    """The norm, without clipping."""
    return clip_grad_norm_(parameters, math.inf, *args, **kwargs)


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


def _can_be_read(items: Sequence[Tensor]) -> bool:
    """Whether a value can be read without waiting for an accelerator or other ranks."""
    return all(type(p.grad) is Tensor and p.grad.is_cpu for p in items[:1] if p.grad is not None)


def _is_bad(norm: Any) -> bool:
    """Whether a norm is known not to be finite."""
    return isinstance(norm, (int, float, Tensor)) and not math.isfinite(norm)
