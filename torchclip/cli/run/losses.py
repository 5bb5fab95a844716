"""The loss of each step: the scalar on which a program calls ``backward()``, for the next optimizer step."""

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
    """Records each scalar on which a program calls ``backward()``, without a GradScaler's scale.

    Several scalars in a step are added, as in gradient accumulation.  ``autograd.grad`` and
    ``backward(gradient=...)`` are not recorded.

    Attributes:
        backwards: how often ``backward()`` was called.
    """

    def __init__(self) -> None:
        self.backwards = 0
        self._pending: Loss | None = None
        self._is_closed = False
        self._is_scaled = False  # whether a scaler has scaled any loss
        # A scaled loss → the original loss; and the last scaler, for values computed from its result.
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

        # The program may import others at any time, such as torch.distributed's scaler.
        setattr(GradScaler, "__init_subclass__", classmethod(see_new_class))  # noqa: B010
        self._detach.append(lambda: delattr(GradScaler, "__init_subclass__"))

    def _replace_in_scaler(self, scaler: type[GradScaler]) -> None:
        """Replace methods of a class of GradScalers and of its subclasses."""
        for name, stand_in in {"scale": self._scale, "update": self._update}.items():
            if name in vars(scaler):
                self._replace(scaler, name, stand_in)
        for derived in scaler.__subclasses__():
            self._replace_in_scaler(derived)

    def detach(self) -> None:
        """Stop recording."""
        while self._detach:
            self._detach.pop()()

    def take(self) -> Loss | None:
        """The loss of the step that begins now; None if there is none."""
        pending, self._pending, self._is_closed = self._pending, None, False
        return pending

    def close(self) -> None:
        """Add nothing more to this step's loss, as the optimizer's closure has been called once."""
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
        if self._is_scaled and tensor in self._unscaled:
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
            self._scaled_by, self._is_scaled = functools.partial(original, scaler), True
        return scaled

    def _update(self, original: Callable[..., Any], scaler: GradScaler, *args: Any, **kwargs: Any) -> Any:
        self._pending = None  # the rest belongs to a step that the scaler has skipped
        return original(scaler, *args, **kwargs)


def _pairs(scaled: Any, outputs: Any) -> list[tuple[Tensor, Tensor]]:
    """Scaled tensors in lists, with the originals; an iterator is used up."""
    if isinstance(outputs, Tensor):
        return [(scaled, outputs)]
    if not isinstance(outputs, (list, tuple)):
        return []
    return [pair for each in zip(scaled, outputs, strict=True) for pair in _pairs(*each)]


def _value(tensor: Tensor) -> Loss:
    """A loss as a number, or as a copied tensor if reading it would wait."""
    if mesh.is_dtensor(tensor):
        tensor = tensor.to_local()
    return float(tensor.item()) if tensor.is_cpu else tensor.detach().reshape(()).clone()
