"""The loss of each step: the scalar on which a program calls ``backward()``, for the next optimizer step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from torchclip.cli.run.gradients import Number, as_number

_SCALE = "torchclip: scale"
_MOST_NODES = 64  # of a loss's graph that are searched


def in_backward() -> bool:
    """Whether this thread runs a backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


class LossRecorder:
    """Records each scalar on which a program calls ``backward()``, without a GradScaler's scale.

    Several scalars in a step are added, as in gradient accumulation.  ``autograd.grad`` and
    ``backward(gradient=...)`` are not recorded.

    Attributes:
        backwards: the number of backward passes so far.
        updates: the number of updates of GradScalers so far.
    """

    def __init__(self) -> None:
        self.backwards = self.updates = 0
        self._pending: Number | None = None
        self._has_scaled = False
        self._is_scaling, self._unscaled = False, frozenset[int]()  # since the last update of a GradScaler
        self._detach: list[Callable[[], None]] = []

    def attach(self) -> None:
        """Record from now on."""
        # Tensor.backward() calls it, too.
        self._replace(torch.autograd, "backward", self._backward)
        self._replace_in_scaler(GradScaler)

        def see_new_class(scaler: type[GradScaler]) -> None:
            super(GradScaler, scaler).__init_subclass__()
            self._replace_in_scaler(scaler)

        # The program may import others at any time, such as torch.distributed's scaler.
        setattr(GradScaler, "__init_subclass__", classmethod(see_new_class))  # noqa: B010
        self._detach.append(lambda: delattr(GradScaler, "__init_subclass__"))

    def _replace_in_scaler(self, scaler: type[GradScaler]) -> None:
        """Replace methods of a class of GradScalers and of its subclasses."""
        stand_ins = {"scale": self._scale, "unscale_": self._unscale, "update": self._update}
        for name, stand_in in stand_ins.items():
            if name in vars(scaler):
                self._replace(scaler, name, stand_in)
        for derived in scaler.__subclasses__():
            self._replace_in_scaler(derived)

    def detach(self) -> None:
        """Stop recording."""
        while self._detach:
            self._detach.pop()()

    def take(self) -> Number | None:
        """The loss of the step that begins now; None if there is none."""
        pending, self._pending = self._pending, None
        return pending

    def unscaled(self) -> frozenset[int] | None:
        """The ``id`` of each optimizer that a GradScaler has unscaled; None if there is no scale."""
        return self._unscaled if self._is_scaling else None

    def _replace(self, owner: Any, name: str, stand_in: Callable[..., Any]) -> None:
        original = vars(owner)[name]

        @functools.wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return original(*args, **kwargs)
            return stand_in(original, *args, **kwargs)

        setattr(owner, name, replaced)
        self._detach.append(lambda: setattr(owner, name, original))

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
        scale = _scale_of(tensor) if self._has_scaled else None
        if scale is not None:
            value = value / as_number(scale(torch.ones((), device=tensor.device)))
        self._pending = value if self._pending is None else self._pending + value

    def _scale(self, original: Callable[..., Any], scaler: GradScaler, outputs: Any) -> Any:
        scaled = original(scaler, outputs)
        if not scaler.is_enabled():
            return scaled
        self._has_scaled = self._is_scaling = True
        return _marked(scaled, functools.partial(original, scaler))

    def _unscale(self, original: Callable[..., Any], scaler: GradScaler, optimizer: Optimizer) -> None:
        original(scaler, optimizer)
        self._unscaled |= {id(optimizer)}

    def _update(self, original: Callable[..., Any], scaler: GradScaler, *args: Any, **kwargs: Any) -> Any:
        self.updates += 1
        self._is_scaling = False
        self._unscaled = frozenset()
        self.take()  # what is left belongs to a step that the scaler has skipped
        return original(scaler, *args, **kwargs)


def _marked(scaled: Any, scale: Callable[[Tensor], Any]) -> Any:
    """Scaled losses, perhaps in lists or an iterator, each with the function that scaled it in its graph."""
    if isinstance(scaled, Tensor):
        node: Any = scaled.grad_fn
        if node is not None:
            node.metadata[_SCALE] = scale
    elif isinstance(scaled, (list, tuple)):
        for each in scaled:
            _marked(each, scale)
    else:
        return (_marked(each, scale) for each in scaled)
    return scaled


def _scale_of(tensor: Tensor) -> Callable[[Tensor], Any] | None:
    """What scaled a loss, or a loss from which it was computed; None for other losses."""
    nodes: list[Any] = [tensor.grad_fn]
    for node in nodes:  # which grows
        if node is not None:
            if _SCALE in node.metadata:
                scale: Callable[[Tensor], Any] = node.metadata[_SCALE]
                return scale
            if len(nodes) < _MOST_NODES:
                nodes += [before for before, _ in node.next_functions]
    return None
