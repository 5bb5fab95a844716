"""Clipping by the norm of all gradients together: torch's three functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torchclip._core import gather, memory, native
from torchclip._core.arguments import flag, full, names_of, norm_type_of, number, shown, threshold
from torchclip._core.batch import Norm, to_result
from torchclip._core.ranks.exchange import Kind, raise_pending
from torchclip._core.scalars import check_finite, clip_coef, norm_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["clip_grad_norm_", "clip_grads_with_norm_", "get_total_norm"]


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor] | nn.Module,
    max_norm: float,
    norm_type: float | str = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: ProcessGroup | Sequence[ProcessGroup] | None = None,
) -> Tensor:
    r"""Scale all gradients together so that their joint norm is at most ``max_norm``.

    The drop-in for ``torch.nn.utils.clip_grad_norm_``.  All gradients are one vector, whose norm is
    ``total_norm``.  Every gradient is multiplied by:

        min(1, max_norm / (total_norm + 1e-6))

    The norm and the coefficient are computed in float64.  If no clipping is needed, gradients in CPU memory
    do not change.  On an accelerator the host does not wait for the device.  The norm of DTensors is the norm
    of the full tensors, the same on every rank, for any mixture of meshes.

    Args:
        parameters: tensors whose ``.grad`` is scaled in place, a single one, or a module (its parameters,
            which errors then name).  Parameters without a gradient are skipped.  A parameter that is listed
            twice counts once.
        max_norm: the threshold, at least 0. ``float("inf")`` only measures.
        norm_type: the order of the norm, any number or ``"inf"``.
        error_if_nonfinite: raise an error if the norm is ``inf`` or ``nan``, before anything changes.  By
            default the norm is returned, and its coefficient multiplies all gradients.  As in torch, only the
            norm is checked.  A norm of order 0 or less may be finite when a gradient is not.
        foreach: accepted for compatibility, without effect.
        group: a process group, or several, whose other ranks have different gradients (pipeline stages,
            experts, manual shards).  All ranks of the group must make the call.  DTensors need no group.

    Returns:
        The norm before clipping, a 0-dim tensor on the device of the first gradient: float64 if any gradient
        is float64 or complex128, else float32.

    Raises:
        TypeError: for anything but tensors in ``parameters``, an integer gradient, a ``max_norm`` or
            ``norm_type`` that is not a number, or a ``group`` that is not a process group.
        ValueError: if ``max_norm`` is negative or NaN, or ``norm_type`` is NaN.
        RuntimeError: if elements of a gradient share memory, as those of an expanded tensor do, or if
            ``error_if_nonfinite`` is True and the norm is not finite (the error names the gradients).

    References:
        Pascanu, Mikolov and Bengio, *On the difficulty of training recurrent neural networks*, 2013, section
        3.2, https://arxiv.org/abs/1211.5063; *Deep Learning from Scratch 2*, section 6.1.4.

    Examples:
        >>> import torch
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> clip_grad_norm_(weight, max_norm=1.0)
        tensor(5.)
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    if not is_dynamo_compiling():
        short = native.clip_grad_norm(parameters, max_norm, norm_type, error_if_nonfinite, group)
        if short is not None:
            return short
    try:
        max_norm = threshold("max_norm", max_norm)
        p = norm_type_of(norm_type)
        error_if_nonfinite = flag("error_if_nonfinite", error_if_nonfinite)
    except (TypeError, ValueError):
        gather.tell_ranks([parameters], group, Kind.CLIP)
        raise
    batch = gather.gradients(parameters, group, Kind.CLIP)
    total_norm = batch.norm(p)
    if error_if_nonfinite:
        raise_pending()
        check_finite(total_norm, p, batch.all, names_of(parameters))
    batch.scale_(clip_coef(max_norm, total_norm))
    return to_result(total_norm, batch)


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float | str = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: ProcessGroup | Sequence[ProcessGroup] | None = None,
) -> Tensor:
    """The norm of all tensors as one vector.

    The drop-in for ``torch.nn.utils.get_total_norm``.  Unlike ``clip_grad_norm_`` it takes the gradients
    themselves, and modifies nothing.

    Args:
        tensors: the tensors, or a single one.  A tensor that is listed twice counts once.
        norm_type: the order of the norm, any number or ``"inf"``.
        error_if_nonfinite: raise an error if the norm is ``inf`` or ``nan``, as for ``clip_grad_norm_``.
        foreach: accepted for compatibility, without effect.
        group: as for ``clip_grad_norm_``.

    Returns:
        A 0-dim tensor on the device of the first tensor: float64 if any tensor is float64 or complex128, else
        float32.  Without tensors, ``tensor(0.)``.

    Raises:
        TypeError: for anything but tensors, a ``norm_type`` that is not a number, or a ``group`` that is not
            a process group.
        ValueError: if ``norm_type`` is NaN.
        RuntimeError: if ``error_if_nonfinite`` is True and the norm is not finite.

    Examples:
        >>> import torch
        >>> get_total_norm([torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    try:
        p = norm_type_of(norm_type)
        error_if_nonfinite = flag("error_if_nonfinite", error_if_nonfinite)
    except (TypeError, ValueError):
        gather.tell_ranks([tensors], group, Kind.MEASURE)
        raise
    batch = gather.tensors(tensors, group)
    total_norm = batch.norm(p)
    if error_if_nonfinite:
        raise_pending()
        remedy = "To disable this error and get the non-finite norm, set `error_if_nonfinite=False`"
        check_finite(total_norm, p, batch.all, remedy=remedy, argument="tensors")
    return to_result(total_norm, batch)


def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor] | nn.Module,
    max_norm: float,
    total_norm: Tensor | float,
    foreach: bool | None = None,
) -> None:
    """Scale all gradients as ``clip_grad_norm_`` does, with a norm that you computed earlier.

    The drop-in for ``torch.nn.utils.clip_grads_with_norm_``.  Every gradient is multiplied by:

        min(1, max_norm / (total_norm + 1e-6))

    Args:
        parameters: tensors whose ``.grad`` is scaled in place, a single one, or a module (its parameters).
        max_norm: the threshold, at least 0.
        total_norm: the norm to compare with it, from ``get_total_norm``; a number, or a tensor (also a
            DTensor) of one element.
        foreach: accepted for compatibility, without effect.

    Raises:
        TypeError: for anything but tensors in ``parameters`` and numbers in the other arguments, or an
            integer gradient.
        ValueError: if ``max_norm`` is negative or NaN, or ``total_norm`` is negative.  A negative
            ``total_norm`` on an accelerator raises no error, and the gradients become NaN.
        RuntimeError: if elements of a gradient share memory, as those of an expanded tensor do.

    Examples:
        >>> import torch
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grads_with_norm_(weight, 1.0, get_total_norm(weight.grad))
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    max_norm = threshold("max_norm", max_norm)
    norm = _as_norm(total_norm)
    batch = gather.gradients(parameters)
    if isinstance(norm, Tensor) and norm.is_meta and not all(grad.is_meta for grad in batch.all):
        raise TypeError(
            "`total_norm` must be a number, got a tensor on the device 'meta', which has no value, for "
            "gradients that are elsewhere"
        )
    batch.scale_(clip_coef(max_norm, norm))


def _as_norm(total_norm: Tensor | float) -> Norm:
    """A norm that the user computed; it stays on its device."""
    if isinstance(total_norm, Tensor) and not memory.on_host([total_norm]):
        if total_norm.numel() != 1 or total_norm.is_complex():
            raise TypeError(
                f"`total_norm` must be a number, got a tensor of shape {tuple(total_norm.shape)} and dtype "
                f"{total_norm.dtype}"
            )
        norm = full(total_norm.detach()).to(norm_dtype(total_norm.device)).view(())
        # Checking whether it is negative would wait.  NaN shows that it was, and reverses no gradient.
        return norm.masked_fill(norm < 0, math.nan)
    value = number("total_norm", total_norm)
    if value < 0:
        raise ValueError(f"`total_norm` must be at least 0, got {shown(value)}")
    return value
