"""The contenders of ``calls.py``: each implementation with gradients for its calls.

All are called in the same way: ``function(gradients, number)``.  The gradients can be restored after
clipping, so that every timing starts with the same values.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from workloads import Workload

import torchclip
from torchclip import kernel

__all__ = ["NAMES", "OPERATIONS", "RIVALS", "Contender", "Gradients", "contenders", "floors"]

OPERATIONS = {
    "norm": "get_total_norm",
    "no clipping": "clip_grad_norm_, not needed",
    "clipping": "clip_grad_norm_, clipping",
    "value": "clip_grad_value_",
}
NAMES = ("torch", "torch.compile", "optax", "kernel off", "torchclip")
RIVALS = ("torch.compile", "optax")
MOST_COMPILED = 200  # gradients: torch.compile takes a minute for 200, and more than nine minutes for 1,000
_PIECE = 1 << 20  # elements in float64 at a time

Call = tuple[Callable[[Any, float], Any], Any]


class Gradients:
    """Standard normal gradients of a workload's shapes.

    Attributes:
        parameters: the parameters, whose values are never used.
        device: of the gradients.
        tensors: the gradients, each with its own memory, as after a backward pass.
        flat: a copy of all gradients as one vector, from which they are restored.
        norm: of the gradients, in float64.
    """

    def __init__(self, workload: Workload, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        generator = torch.Generator().manual_seed(0)
        dtype = workload.dtype
        self.tensors = [
            torch.randn(shape, generator=generator).to(self.device, dtype) for shape in workload.shapes
        ]
        self.parameters = [nn.Parameter(torch.empty_like(tensor)) for tensor in self.tensors]
        for parameter, tensor in zip(self.parameters, self.tensors, strict=True):
            parameter.grad = tensor
        self.flat = torch.cat([tensor.flatten() for tensor in self.tensors])
        self.norm = _exact_norm(self.flat)

    def originals(self) -> list[Tensor]:
        """The original gradients: views into ``flat``."""
        pieces = torch.split(self.flat, [tensor.numel() for tensor in self.tensors])
        return [piece.view(tensor.shape) for piece, tensor in zip(pieces, self.tensors, strict=True)]

    def restore(self) -> None:
        """Undo all changes to ``tensors``."""
        for tensor, original in zip(self.tensors, self.originals(), strict=True):
            tensor.copy_(original)


def _exact_norm(flat: Tensor) -> float:
    pieces = (piece.double() for piece in torch.split(flat, _PIECE))
    return math.sqrt(math.fsum(float(piece.dot(piece)) for piece in pieces))


class Contender(NamedTuple):
    """One implementation with its gradients.

    Attributes:
        calls: for each operation, the timed function and its first argument.
        restore: restores the gradients.
        context: a context manager for all calls.
        one_number: whether all calls get the same number.
    """

    calls: Mapping[str, Call]
    restore: Callable[[], None]
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    one_number: bool = False


def contenders(gradients: Gradients, rivals: Sequence[str]) -> dict[str, Contender]:
    """All contenders that can run here, by name, as in ``NAMES``.

    Args:
        gradients: the gradients that they clip.
        rivals: which of ``RIVALS`` take part: ``torch.compile`` on up to ``MOST_COMPILED`` gradients, optax
            if it is installed.
    """
    found = {"torch": _in_torch(torch.nn.utils, gradients)}
    if "torch.compile" in rivals and len(gradients.tensors) <= MOST_COMPILED:
        found["torch.compile"] = _compiled(gradients)
    on_host = gradients.device.type == "cpu"
    if on_host and "optax" in rivals and all(map(importlib.util.find_spec, ("optax", "jax"))):
        found["optax"] = _optax(gradients)
    if on_host and kernel.status().startswith("active"):
        found["kernel off"] = _in_torch(torchclip, gradients, kernel.disabled)
    found["torchclip"] = _in_torch(torchclip, gradients)
    return found


def _in_torch(
    functions: Any,
    gradients: Gradients,
    context: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Contender:
    by_norm = (functions.clip_grad_norm_, gradients.parameters)
    calls = {
        "norm": (functions.get_total_norm, gradients.tensors),
        "no clipping": by_norm,
        "clipping": by_norm,
        "value": (functions.clip_grad_value_, gradients.parameters),
    }
    return Contender(calls, gradients.restore, context)


def _compiled(gradients: Gradients) -> Contender:
    # torch keeps compiled code for each function, up to a limit that several workloads would reach.
    torch.compiler.reset()
    names = ("get_total_norm", "clip_grad_norm_", "clip_grad_value_")
    functions = {name: torch.compile(getattr(torch.nn.utils, name)) for name in names}
    # It compiles again for every new number, and stops after eight.  With a constant threshold, nothing has
    # to be clipped from the second call on, but torch multiplies in any case, so the work is the same.
    return _in_torch(SimpleNamespace(**functions), gradients)._replace(one_number=True)


def _optax(gradients: Gradients) -> Contender:
    """optax under ``jax.jit``; the arrays' memory is donated, so that it works in place."""
    import jax
    import jax.numpy as jnp
    import optax

    arrays: list[jax.Array] = []

    def restore() -> None:
        arrays[:] = [
            jnp.array(jnp.from_dlpack(tensor.clone()), copy=True) for tensor in gradients.originals()
        ]

    def in_place(rule: Callable[[float], optax.GradientTransformation]) -> Call:
        def updated(arrays: list[jax.Array], number: float) -> Any:
            return rule(number).update(arrays, optax.EmptyState())[0]

        update = jax.jit(updated, donate_argnums=0)

        def call(arrays: list[jax.Array], number: float) -> None:
            arrays[:] = jax.block_until_ready(update(arrays, number))

        return call, arrays

    total_norm = jax.jit(optax.global_norm)
    by_norm = in_place(optax.clip_by_global_norm)
    calls = {
        "norm": (lambda arrays, _: jax.block_until_ready(total_norm(arrays)), arrays),
        "no clipping": by_norm,
        "clipping": by_norm,
        "value": in_place(optax.clip),
    }
    return Contender(calls, restore)


def floors(gradients: Gradients) -> Contender:
    """The memory traffic alone: passes over one tensor of the same size.

    A norm takes a pass that reads.  Clipping by norm takes another one that reads and writes, and clipping by
    value only that one.
    """
    flat = gradients.flat
    if flat.dtype == torch.bfloat16:  # converting costs time, so take the same bytes as float32
        flat = flat[: flat.numel() // 2 * 2].view(torch.float32)

    calls: dict[str, Callable[[Tensor, float], object]] = {
        "norm": lambda flat, _: flat.sum(),
        "no clipping": lambda flat, _: flat.sum(),
        "clipping": lambda flat, _: (flat.sum(), flat.mul_(1.0)),
        "value": lambda flat, _: flat.mul_(1.0),
    }
    return Contender({name: (call, flat) for name, call in calls.items()}, restore=lambda: None)
