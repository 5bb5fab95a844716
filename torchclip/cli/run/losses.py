"""The loss of each step: what a program calls ``backward()`` on, kept for the optimizer that steps next."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.utils.weak import WeakTensorKeyDictionary

from torchclip._core import mesh

__all__ = ["Loss", "LossRecorder"]

Loss = float | Tensor
"""A number, or on an accelerator a tensor, so that nothing waits for it."""


class LossRecorder:
    """Sees each scalar that a program calls ``backward()`` on, without a GradScaler's scale.

    Several within a step are added up, as gradient accumulation does.  ``autograd.grad`` and
    ``backward(gradient=...)`` are not seen.

    Attributes:
        backwards: how often ``backward()`` was called, on whatever.
    """

    def __init__(self) -> None:
        self.backwards = 0
        self._pending: Loss | None = None
        self._is_closed = False
        # A scaled loss → the loss as it was; and what has scaled last, for what is computed from its result.
        self._unscaled = WeakTensorKeyDictionary()
        self._scaled_by: Callable[[Tensor], Any] | None = None
        self._detach: list[Callable[[], None]] = []

    def attach(self) -> None:
        """Record from now on."""
        self._replace(Tensor, "backward", self._backward)
        self._replace_in_scaler(GradScaler)

        def see_new_class(scaler: type[GradScaler]) -> None:
            super(GradScaler, scaler).__init_subclass__()
            self._replace_in_scaler(scaler)

        # Such as torch.distributed's scaler, which the program may import at any time.
        setattr(GradScaler, "__init_subclass__", classmethod(see_new_class))  # noqa: B010
        self._detach.append(lambda: delattr(GradScaler, "__init_subclass__"))

    def _replace_in_scaler(self, scaler: type[GradScaler]) -> None:
        """Replace the methods of a class of GradScalers, and of those that are derived from it."""
        for name, stand_in in {"scale": self._scale, "update": self._update}.items():
            if name in vars(scaler):
                self._replace(scaler, name, stand_in)
        for derived in scaler.__subclasses__():
            self._replace_in_scaler(derived)

    def detach(self) -> None:
        """Record no more."""
        while self._detach:
            self._detach.pop()()

    def take(self) -> Loss | None:
        """The loss of the step that begins now, None if there was none."""
        pending, self._pending, self._is_closed = self._pending, None, False
        return pending

    def close(self) -> None:
        """Add nothing more to this step's loss: the closure of an optimizer has been called once."""
        self._is_closed = True

    def _replace(self, owner: type, name: str, stand_in: Callable[..., Any]) -> None:
        original = vars(owner)[name]

        @functools.wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return original(*args, **kwargs)
            return stand_in(original, *args, **kwargs)

        setattr(owner, name, replaced)
        self._detach.append(lambda: setattr(owner, name, original))

    def _backward(self, original: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.backwards += 1
        gradient = args[0] if args else kwargs.get("gradient")
        if gradient is None and tensor.numel() == 1 and not tensor.is_complex():
            self._add(tensor)
        return original(tensor, *args, **kwargs)

    def _add(self, tensor: Tensor) -> None:
        scaled_by, self._scaled_by = self._scaled_by, None
        if self._is_closed:
            return
        if len(self._unscaled) and tensor in self._unscaled:
            value: Loss = self._unscaled[tensor]
        else:
            value = _value(tensor)
            if scaled_by is not None:
                value = value / _value(scaled_by(torch.ones((), device=tensor.device)))
        self._pending = value if self._pending is None else self._pending + value

    def _scale(self, original: Callable[..., Any], scaler: GradScaler, outputs: Any) -> Any:
        scaled = original(scaler, outputs)
        if scaler.is_enabled():
            for each, before in _pairs(scaled, outputs):
                if before.numel() == 1:
                    self._unscaled[each] = _value(before)
            self._scaled_by = functools.partial(original, scaler)
        return scaled

    def _update(self, original: Callable[..., Any], scaler: GradScaler, *args: Any, **kwargs: Any) -> Any:
        self._pending = None  # what is left belongs to a step that the scaler has skipped
        return original(scaler, *args, **kwargs)


def _pairs(scaled: Any, outputs: Any) -> list[tuple[Tensor, Tensor]]:
    """Scaled tensors in lists, and what they were before; an iterator has none left."""
    if isinstance(outputs, Tensor):
        return [(scaled, outputs)]
    if not isinstance(outputs, (list, tuple)):
        return []
    return [pair for each in zip(scaled, outputs, strict=True) for pair in _pairs(*each)]


def _value(tensor: Tensor) -> Loss:
    """A loss as a number, or as a tensor of its own where to read it would be to wait."""
    if mesh.is_dtensor(tensor):
        tensor = tensor.to_local()
    return float(tensor.item()) if tensor.is_cpu else tensor.detach().reshape(()).clone()
