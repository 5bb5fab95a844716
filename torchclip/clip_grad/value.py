"""Clipping each element by value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torchclip._core import gather, native
from torchclip._core.arguments import threshold
from torchclip._core.batch import Batch, Facts

__all__ = ["Value", "clip_grad_value_"]


def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor] | nn.Module, clip_value: float, foreach: bool | None = None
) -> None:
    """Limit every element of the gradients to ``[-clip_value, clip_value]``.

    The drop-in for ``torch.nn.utils.clip_grad_value_``.  Unlike clipping by norm, this changes the
    direction of the step.

    Args:
        parameters: tensors whose ``.grad`` is changed in place, a single one, or a module (its parameters).
        clip_value: the largest magnitude allowed, at least 0. NaN in a gradient stays NaN.
        foreach: accepted for compatibility, without effect.

    Raises:
        TypeError: for anything but tensors in ``parameters``, an integer or complex gradient, or a
            ``clip_value`` that is not a number.
        ValueError: if ``clip_value`` is negative or NaN.
        RuntimeError: if elements of a gradient share memory, as those of an expanded tensor do.

    Examples:
        >>> import torch
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> weight.grad = torch.tensor([-3.0, 0.5])
        >>> clip_grad_value_(weight, 1.0)
        >>> weight.grad
        tensor([-1.0000,  0.5000])
    """
    if not is_dynamo_compiling() and native.clip_grad_value(parameters, clip_value):
        return
    clip_value = threshold("clip_value", clip_value)
    _clip(gather.gradients(parameters), clip_value)


def _clip(batch: Batch, clip_value: float) -> None:
    if batch.facts & Facts.COMPLEX:
        raise TypeError(
            "`parameters` has complex gradients, and complex numbers cannot be limited by value; "
            "clip by norm instead (clip_grad_norm_)"
        )
    batch.clamp_(clip_value)


@dataclass(eq=False)
class Value:
    """``clip_grad_value_`` as a rule for a ``Clipper``: ``Clipper(optimizer, Value(0.5))``.

    With a GradScaler and a fused optimizer, the gradients are still multiplied by the scale, so this rule
    waits for the scale.

    Args:
        clip_value: the largest magnitude allowed for an element, at least 0.

    Raises:
        TypeError: if ``clip_value`` is not a number.
        ValueError: if ``clip_value`` is negative or NaN.

    Examples:
        >>> Value(0.5)
        Value(clip_value=0.5)
    """

    _by_element = True  # it needs no norm

    clip_value: float

    def __post_init__(self) -> None:
        self.clip_value = threshold("clip_value", self.clip_value)

    def clip_(self, parameters: Sequence[Tensor], grad_scale: Tensor | None = None) -> None:
        """Clip the gradients of the parameters in place."""
        scale = 1.0 if grad_scale is None else float(grad_scale)
        _clip(gather.gradients(parameters), scale * self.clip_value)
