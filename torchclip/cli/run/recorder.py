"""What calls of torch's clipping functions do and cost, taken down while a program runs."""

from __future__ import annotations

import functools
import inspect
import math
import random
import threading
import time
from collections import Counter, deque
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

__all__ = ["Cost", "Recorder"]

# Sampled densely at first, so that a short program is measured too.
_FIRST_CALLS = 32
_SHARE_OF_FIRST_CALLS = 1 / 2
_SHARE = 1 / 64
_MOST_TIMES = 10_000


class Cost:
    """Calls of one function, and the seconds that the latest of them took on the host.

    Attributes:
        calls: how many there were.
        ours: times in torchclip.
        torchs: times that torch's function took, in other calls.
        sampled: whether torch's function ran at all.
        torch_error: what torch's function raised, if it did.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.ours: deque[float] = deque(maxlen=_MOST_TIMES)
        self.torchs: deque[float] = deque(maxlen=_MOST_TIMES)
        self.sampled = False
        self.torch_error: str | None = None


class Recorder:
    """Stands between a program and the functions that ``torchclip.install`` has put in place.

    Every call is either timed or sampled.  In a sampled call torch's function runs first, on the same
    gradients, with a threshold that leaves them as they are: it computes their norm and multiplies them by 1.
    It thus finds them as the backward pass has left them, like torchclip in the timed calls; what torchclip
    takes in a sampled call does not count.  Nor do a function's first call, and the first of torch's.  Half
    of the first calls and one in 64 of the others are sampled, drawn at random (not with the program's
    random numbers).  Tensor subclasses are not: for DTensors torch's function would communicate.

    Nothing waits for an accelerator; work there that goes on when a call has returned is not in the times.
    Calls inside of a function under ``torch.compile`` are not seen.

    Where a trial replaces the program's clipping, the functions only measure.

    Attributes:
        costs (dict[str, Cost]): the functions that were called, by name.
        calls (Calls): what they did, for the optimizers that step next.
        seconds: how long torch's function ran for comparison, and what else this takes.
        replaced (Counter[str]): the calls that only measured, by function.
    """

    def __init__(self, calls: Calls | None = None, trial: Trial | None = None) -> None:
        self.costs: dict[str, Cost] = {}
        self.calls = Calls() if calls is None else calls
        self.seconds = 0.0
        self.replaced: Counter[str] = Counter()
        self._trial = Trial() if trial is None else trial
        self._lock = threading.Lock()
        self._random = random.Random(0)
        self._ours = {function.__name__: function for _, _, function in patch.places()}
        self._torchs = {name: vars(function)["__wrapped__"] for name, function in self._ours.items()}

    def attach(self) -> None:
        """Step in; ``torchclip.uninstall`` takes it out with the rest."""
        global _attached
        _attached = self
        for module, name, function in patch.places():
            stand_in = _STAND_INS[function.__name__]
            vars(stand_in)["__wrapped__"] = self._torchs[function.__name__]
            setattr(module, name, stand_in)

    # What is done in the functions' place; the names of the arguments are those that a program may use

    def clip_grad_norm_(self, parameters: Any, max_norm: Any, *args: Any, **kwargs: Any) -> Any:
        """Clip, and keep what that did."""
        ours = self._ours["clip_grad_norm_"]
        if torch.compiler.is_compiling():
            return ours(parameters, max_norm, *args, **kwargs)
        if self._trial.replaces:
            self.replaced["clip_grad_norm_"] += 1
            return ours(parameters, math.inf, *args, **kwargs)
        start = time.perf_counter()
        given, items = _listed(parameters)
        walking = time.perf_counter() - start
        bad: list[int] = []
        raises = kwargs.get("error_if_nonfinite", False)
        if len(args) > 1 or raises or not _can_be_read(items):
            norm = self._call("clip_grad_norm_", walking, given, max_norm, *args, **kwargs)
        else:
            # Which gradients are not finite can be seen as long as they have not been multiplied by NaN.
            strict = {**kwargs, "error_if_nonfinite": True}
            try:
                norm = self._call("clip_grad_norm_", walking, given, max_norm, *args, **strict)
            except RuntimeError:
                bad = nonfinite_ids(items)
                if self._trial.nonfinite is not None:  # its Clipper needs the gradients as they are
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
        self._call("clip_grads_with_norm_", 0.0, given, max_norm, total_norm, *args, **kwargs)
        self._keep("clip_grads_with_norm_", items, max_norm, total_norm, bad)

    def clip_grad_value_(self, parameters: Any, clip_value: Any, *args: Any, **kwargs: Any) -> None:
        """Clip, and keep the norm before and after."""
        if self._trial.replaces:
            self.replaced["clip_grad_value_"] += 1
            return
        if torch.compiler.is_compiling():
            self._ours["clip_grad_value_"](parameters, clip_value, *args, **kwargs)
            return
        start = time.perf_counter()
        given, items = _listed(parameters)
        walking = time.perf_counter() - start
        before = norm_of(items)
        self._call("clip_grad_value_", walking, given, clip_value, *args, **kwargs)
        after = norm_of(items)
        if before is not None and after is not None:
            bad = nonfinite_ids(items) if _is_bad(before) else []
            clip_coef = after / before if isinstance(before, Tensor) or before else 1.0
            self.calls.add(items, Call("clip_grad_value_", before, math.inf, clip_coef, bad))

    def get_total_norm(self, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        """Take the norm."""
        start = time.perf_counter()
        given = list(tensors) if isinstance(tensors, Iterator) else tensors
        return self._call("get_total_norm", time.perf_counter() - start, given, *args, **kwargs)

    def _call(self, name: str, walking: float, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        """Call torchclip's function, and either time it or sample torch's before.

        ``walking`` seconds went into an iterator before, which both would walk themselves.
        """
        ours = self._ours[name]
        if torch.compiler.is_compiling():
            return ours(tensors, *args, **kwargs)
        with self._lock:
            cost = self.costs.setdefault(name, Cost())
            cost.calls += 1
            share = _SHARE_OF_FIRST_CALLS if cost.calls <= _FIRST_CALLS else _SHARE
            sample = cost.calls > 1 and self._random.random() < share
        start = time.perf_counter()
        if sample:
            self._sample(cost, walking, name, tensors, *args, **kwargs)
            self.seconds += time.perf_counter() - start
            return ours(tensors, *args, **kwargs)
        result = ours(tensors, *args, **kwargs)
        seconds = time.perf_counter() - start
        if cost.calls > 1:
            cost.ours.append(walking + seconds)
        return result

    def _sample(self, cost: Cost, walking: float, name: str, tensors: Any, *args: Any, **kwargs: Any) -> None:
        """Time torch's function, with arguments that leave every tensor as it is.

        ``walking`` seconds went into an iterator before, which torch's function would walk itself.
        """
        try:
            given = inspect.signature(self._ours[name]).bind(tensors, *args, **kwargs)
            given.apply_defaults()
            items = [tensors] if isinstance(tensors, Tensor) else list(tensors)
            torchs = self._harmless(name, items, **given.arguments)
            if torchs is None:
                return
            start = time.perf_counter()
            torchs()
            seconds = walking + time.perf_counter() - start
        except Exception as error:
            # Torch's function would have raised here; what the program sees is torchclip's answer.
            cost.torch_error = f"{type(error).__name__}: {error}"
        else:
            if cost.sampled:
                cost.torchs.append(seconds)
            cost.sampled = True

    def _harmless(
        self, name: str, items: list[Tensor], norm_type: Any = 2.0, foreach: bool | None = None, **_: Any
    ) -> Callable[[], object] | None:
        """What torch's function does with these arguments, without an effect; None for tensor subclasses."""
        read = items if name == "get_total_norm" else [p.grad for p in items if p.grad is not None]
        if not read or any(type(tensor) is not Tensor for tensor in read):
            return None
        norm_is_0 = torch.zeros((), device=read[0].device)
        norm, scale_ = self._torchs["get_total_norm"], self._torchs["clip_grads_with_norm_"]

        def norm_and_scale() -> None:
            norm([p.grad for p in items if p.grad is not None], norm_type, foreach=foreach)
            scale_(items, math.inf, norm_is_0, foreach)

        return {
            "clip_grad_norm_": norm_and_scale,
            "clip_grad_value_": lambda: self._torchs["clip_grad_value_"](items, math.inf, foreach),
            "clip_grads_with_norm_": lambda: scale_(items, math.inf, norm_is_0, foreach),
            "get_total_norm": lambda: norm(read, norm_type, foreach=foreach),
        }[name]

    def _keep(self, name: str, items: list[Tensor], max_norm: Any, total_norm: Any, bad: list[int]) -> None:
        """Keep a call for the optimizers that step next, without waiting for an accelerator."""
        if torch.compiler.is_compiling():
            return
        start = time.perf_counter()
        if isinstance(total_norm, Tensor):
            if mesh.is_dtensor(total_norm) and all(p.is_replicate() for p in total_norm.placements):
                total_norm = total_norm.to_local()
            if type(total_norm) is not Tensor:
                return
            total_norm = float(total_norm) if total_norm.is_cpu else total_norm.detach()
        max_norm = float(max_norm)
        self.calls.add(items, Call(name, total_norm, max_norm, clip_coef(max_norm, total_norm), bad))
        self.seconds += time.perf_counter() - start


def _listed(parameters: Any) -> tuple[Any, list[Tensor]]:
    """What to hand on, and the parameters, which a program may have in an iterator that is walked once."""
    if isinstance(parameters, Tensor):
        return parameters, [parameters]
    if isinstance(parameters, nn.Module):
        return parameters, list(parameters.parameters())
    if not isinstance(parameters, Iterable):
        return parameters, []
    items = list(parameters)
    # A generator without items is warned of, and what holds no tensors is refused, as ever.
    walked = isinstance(parameters, Iterator) and items
    return items if walked else parameters, [item for item in items if isinstance(item, Tensor)]


def _can_be_read(items: Sequence[Tensor]) -> bool:
    """Whether to look at a value costs no wait for an accelerator and no message to other ranks."""
    return all(type(p.grad) is Tensor and p.grad.is_cpu for p in items[:1] if p.grad is not None)


def _is_bad(norm: Any) -> bool:
    """Whether a norm is known not to be finite."""
    return isinstance(norm, (int, float, Tensor)) and not math.isfinite(norm)


_attached: Recorder | None = None
"""Whose turn it is; none in another process, which got one of the functions below in a pickle."""


def _stand_in(ours: Callable[..., Any]) -> Callable[..., Any]:
    """What a program gets in the place of a function: a function of this module, as pickles need."""

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return (ours if _attached is None else getattr(_attached, ours.__name__))(*args, **kwargs)

    functools.update_wrapper(stand_in, ours)
    vars(stand_in).pop("__wrapped__")  # which is torch's function, while it is replaced
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
