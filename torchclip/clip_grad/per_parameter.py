"""Clipping each gradient by its own norm."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torchclip._core import gather, native
from torchclip._core.arguments import norm_type_of, threshold
from torchclip._core.batch import clip_each_, to_results
from torchclip._core.ranks.exchange import Kind
from torchclip._core.scalars import EPS

__all__ = ["clip_grad_norm_per_parameter_"]


def clip_grad_norm_per_parameter_(
    parameters: Tensor | Iterable[Tensor] | nn.Module, max_norm: float, norm_type: float | str = 2.0
) -> Tensor:
    """Clip each gradient to ``max_norm`` by itself.

    Args:
        parameters: tensors whose ``.grad`` is scaled in place, a single one, or a module (its parameters).
        max_norm: the threshold for each gradient's norm, at least 0. ``float("inf")`` only measures.
        norm_type: the order of the norm, any number or ``"inf"``.

    Returns:
        The norms before clipping, in the order of the distinct gradients: a tensor of shape ``(gradients,)``,
        with the dtype and device that ``clip_grad_norm_`` returns.

    Raises:
        TypeError: for anything but tensors in ``parameters``, an integer gradient, or a ``max_norm`` or
            ``norm_type`` that is not a number.
        ValueError: if ``max_norm`` is negative or NaN, or ``norm_type`` is NaN.
        RuntimeError: if elements of a gradient share memory, as those of an expanded tensor do.

    Examples:
        >>> import torch
        >>> a, b = (torch.zeros(2, requires_grad=True) for _ in range(2))
        >>> a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])
        >>> clip_grad_norm_per_parameter_([a, b], max_norm=1.0)
        tensor([5.0000, 0.5000])
        >>> a.grad, b.grad
        (tensor([0.6000, 0.8000]), tensor([0.3000, 0.4000]))
    """
    if not is_dynamo_compiling():
        short = native.clip_grad_each(parameters, max_norm, norm_type, False)
        if short is not None:
            return short
    try:
        max_norm = threshold("max_norm", max_norm)
        p = norm_type_of(norm_type)
    except (TypeError, ValueError):
        gather.tell_ranks([parameters], None, Kind.CLIP_EACH)
        raise
    batch = gather.gradients(parameters, kind=Kind.CLIP_EACH)
    return to_results(clip_each_(batch, max_norm, p, EPS), batch)
