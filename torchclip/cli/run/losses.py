"""The loss of each step: the scalar on which a program calls ``backward()``, for the next optimizer step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from torchclip.cli.run.gradients import Number, as_number


def in_backward() -> bool:
    """Whether this thread runs a backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


class LossRecorder:
    """Records each scalar on which a program calls ``backward()``, without a GradScaler's scale.

    Several scalars in a step are added, as in gradient accumulation.  Between a GradScaler's ``scale()`` and
    its ``update()`` all of them count as scaled.  ``autograd.grad`` and ``backward(gradient=...)`` are not
    recorded.

    Attributes:
        backwards: the number of backward passes so far.
        updates: the number of updates of GradScalers so far.
    """

    def __init__(self) -> None:
        self.backwards = self.updates = 0
        self._pending: Number | None = None
        # Since the last update: the GradScaler that has scaled, and the optimizers that it has unscaled.
        self._scaler: GradScaler | None = None
        self._unscaled = frozenset[int]()

    def attach(self, stack: ExitStack) -> None:
        """Record until the stack is closed."""
        self._stack = stack
        # Tensor.backward() calls it, too.
        self._replace(torch.autograd, "backward", self._backward)
        self._replace_in_scaler(GradScaler)

        def see_new_class(scaler: type[GradScaler]) -> None:
            super(GradScaler, scaler).__init_subclass__()
            self._replace_in_scaler(scaler)

        # The program may import others at any time, such as torch.distributed's scaler.
        setattr(GradScaler, "__init_subclass__", classmethod(see_new_class))  # noqa: B010
        stack.callback(delattr, GradScaler, "__init_subclass__")

    def _replace_in_scaler(self, scaler: type[GradScaler]) -> None:
        """Replace methods of a class of GradScalers and of its subclasses."""
        stand_ins = {"scale": self._scale, "unscale_": self._unscale, "update": self._update}
        for name, stand_in in stand_ins.items():
            if name in vars(scaler):
                self._replace(scaler, name, stand_in)
        for derived in scaler.__subclasses__():
            self._replace_in_scaler(derived)

    def take(self) -> Number | None:
        """The loss of the step that begins now; None if there is none."""
        pending, self._pending = self._pending, None
        return pending

    def unscaled(self) -> frozenset[int] | None:
        """The ``id`` of each optimizer that a GradScaler has unscaled; None if there is no scale."""
        return None if self._scaler is None else self._unscaled

    def _replace(self, owner: Any, name: str, stand_in: Callable[..., Any]) -> None:
        original = vars(owner)[name]

        @functools.wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return original(*args, **kwargs)
            return stand_in(original, *args, **kwargs)

        setattr(owner, name, replaced)
        self._stack.callback(setattr, owner, name, original)

    def _backward(
        self, original: Callable[..., Any], tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        self.backwards += not in_backward()  # checkpoints are computed again within one
        if grad_tensors is None and kwargs.get("grad_variables") is None:
            for tensor in [tensors] if isinstance(tensors, Tensor) else list(tensors):
                if isinstance(tensor, Tensor) and tensor.numel() == 1 and not tensor.is_complex():
                    self._add(tensor)
        return original(tensors, grad_tensors, *args, **kwargs)

    def _add(self, tensor: Tensor) -> None:
        value = as_number(tensor)
        if self._scaler is not None:
            value = value / as_number(self._scaler.scale(torch.ones((), device=tensor.device)))
        self._pending = value if self._pending is None else self._pending + value

    def _scale(self, original: Callable[..., Any], scaler: GradScaler, outputs: Any) -> Any:
        if scaler.is_enabled():
            self._scaler = scaler
        return original(scaler, outputs)

    def _unscale(self, original: Callable[..., Any], scaler: GradScaler, optimizer: Optimizer) -> None:
        original(scaler, optimizer)
        self._unscaled |= {id(optimizer)}

    def _update(self, original: Callable[..., Any], scaler: GradScaler, *args: Any, **kwargs: Any) -> Any:
        self.updates += 1
        self._scaler, self._unscaled = None, frozenset()
        self.take()  # what is left belongs to a step that the scaler has skipped
        return original(scaler, *args, **kwargs)
