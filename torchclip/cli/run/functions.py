"""Records what calls of torch's clipping functions do, and how long they take, while a program runs."""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchclip import patch
from torchclip._core import mesh
from torchclip._core.scalars import clip_coef
from torchclip.cli.run.calls import Call, Calls
from torchclip.cli.run.gradients import nonfinite_ids, norm_of
from torchclip.cli.run.trial import Trial

__all__ = ["FunctionRecorder"]

_MOST_TIMES = 10_000


class FunctionRecorder:
    """Wraps the functions that ``torchclip.install`` has installed.

    No call waits for an accelerator; the times do not include work there that continues after a call has
    returned.  Calls inside a function under ``torch.compile`` are not recorded.  If a trial replaces the
    program's clipping, the functions only measure.

    Attributes:
        calls (Calls): their effects, for the optimizers that step next.
        counts (Counter[str]): the calls of each function, by its name.
        seconds (dict[str, deque[float]]): how long the latest calls took on the host.
        replaced (Counter[str]): the calls that only measured, by function.
    """

    def __init__(self, calls: Calls, trial: Trial) -> None:
        self.calls = calls
        self.counts: Counter[str] = Counter()
        self.seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_MOST_TIMES))
        self.replaced: Counter[str] = Counter()
        self._trial = trial
        self._ours = {function.__name__: function for _, _, function in patch.places()}

    def attach(self) -> None:
        """Record from now on; ``torchclip.uninstall`` ends it with the rest."""
        global _attached
        _attached = self
        for module, name, function in patch.places():
            stand_in = _STAND_INS[function.__name__]
            vars(stand_in)["__wrapped__"] = vars(function)["__wrapped__"]
            setattr(module, name, stand_in)

    # The wrappers; their arguments have the names that a program may use

    def clip_grad_norm_(self, parameters: Any, max_norm: Any, *args: Any, **kwargs: Any) -> Any:
        """Clip, and keep what that did."""
        ours = self._ours["clip_grad_norm_"]
        if torch.compiler.is_compiling():
            return ours(parameters, max_norm, *args, **kwargs)
        if self._trial.replaces:
            self.replaced["clip_grad_norm_"] += 1
            return ours(parameters, math.inf, *args, **kwargs)
        given, items = _listed(parameters)
        bad: list[int] = []
        raises = kwargs.get("error_if_nonfinite", False)
        if len(args) > 1 or raises or not _can_be_read(items):
            norm = self._call("clip_grad_norm_", given, max_norm, *args, **kwargs)
        else:
            # After a multiplication by NaN, it is too late to see which gradients are not finite.
            strict = {**kwargs, "error_if_nonfinite": True}
            try:
                norm = self._call("clip_grad_norm_", given, max_norm, *args, **strict)
            except RuntimeError:
                bad = nonfinite_ids(items)
                if self._trial.nonfinite is not None:  # its Clipper needs the original gradients
                    max_norm = math.inf
                norm = ours(given, max_norm, *args, **kwargs)
        self._keep("clip_grad_norm_", items, max_norm, norm, bad)
        return norm

    def clip_grads_with_norm_(
        self, parameters: Any, max_norm: Any, total_norm: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Clip, and keep what that did."""
        if self._trial.replaces:
            self.replaced["clip_grads_with_norm_"] += 1
            return
        given, items = _listed(parameters)
        bad = nonfinite_ids(items) if _is_bad(total_norm) and _can_be_read(items) else []
        self._call("clip_grads_with_norm_", given, max_norm, total_norm, *args, **kwargs)
        self._keep("clip_grads_with_norm_", items, max_norm, total_norm, bad)

    def clip_grad_value_(self, parameters: Any, clip_value: Any, *args: Any, **kwargs: Any) -> None:
        """Clip, and keep the norm before and after."""
        if self._trial.replaces:
            self.replaced["clip_grad_value_"] += 1
            return
        if torch.compiler.is_compiling():
            self._ours["clip_grad_value_"](parameters, clip_value, *args, **kwargs)
            return
        given, items = _listed(parameters)
        before = norm_of(items)
        self._call("clip_grad_value_", given, clip_value, *args, **kwargs)
        after = norm_of(items)
        if before is not None and after is not None:
            bad = nonfinite_ids(items) if _is_bad(before) else []
            clip_coef = after / before if isinstance(before, Tensor) or before else 1.0
            self.calls.add(items, Call("clip_grad_value_", before, math.inf, clip_coef, bad))

    def get_total_norm(self, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        """Measure the norm."""
        return self._call("get_total_norm", tensors, *args, **kwargs)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call torchclip's function, and measure the time."""
        if torch.compiler.is_compiling():
            return self._ours[name](*args, **kwargs)
        self.counts[name] += 1
        start = time.perf_counter()
        try:
            return self._ours[name](*args, **kwargs)
        finally:
            self.seconds[name].append(time.perf_counter() - start)

    def _keep(self, name: str, items: list[Tensor], max_norm: Any, total_norm: Any, bad: list[int]) -> None:
        """Keep a call for the optimizers that step next, without waiting for an accelerator."""
        if torch.compiler.is_compiling():
            return
        if isinstance(total_norm, Tensor):
            if mesh.is_dtensor(total_norm) and all(p.is_replicate() for p in total_norm.placements):
                total_norm = total_norm.to_local()
            if type(total_norm) is not Tensor:
                return
            total_norm = float(total_norm) if total_norm.is_cpu else total_norm.detach()
        max_norm = float(max_norm)
        self.calls.add(items, Call(name, total_norm, max_norm, clip_coef(max_norm, total_norm), bad))


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


_attached: FunctionRecorder | None = None
"""The recorder; None in another process that unpickled one of the functions below."""


def _stand_in(ours: Callable[..., Any]) -> Callable[..., Any]:
    """What replaces a function in a program: a function of this module, as pickle requires."""

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return (ours if _attached is None else getattr(_attached, ours.__name__))(*args, **kwargs)

    functools.update_wrapper(stand_in, ours)
    vars(stand_in).pop("__wrapped__")  # torch's function, while it is replaced
    stand_in.__module__ = __name__
    vars(stand_in)["__signature__"] = inspect.signature(ours)
    return stand_in


clip_grad_norm_ = _stand_in(patch.clip_grad_norm_)
clip_grad_value_ = _stand_in(patch.clip_grad_value_)
clip_grads_with_norm_ = _stand_in(patch.clip_grads_with_norm_)
get_total_norm = _stand_in(patch.get_total_norm)

_STAND_INS = {
    function.__name__: function
    for function in (clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm)
}
