"""The clipping functions: each one is a norm, a coefficient, and a scaling in place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from torchclip._core import eager, gradients
from torchclip._core.arguments import (
    flag,
    full,
    norm_order,
    number,
    refuse_item,
    shown,
    tensor_list,
    threshold,
)
from torchclip._core.batch import Facts
from torchclip._core.combine import combine_tensors, norm_dtype
from torchclip._core.norm import as_result, as_results, refuse_nonfinite
from torchclip.clip_grad import units

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "clip_coefficient",
    "clip_grad_adaptive_",
    "clip_grad_norm_",
    "clip_grad_norm_per_parameter_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "clip_per_example",
    "get_total_norm",
]

# Elements of examples copied in one go.
_PIECE = 1 << 20


@overload
def clip_coefficient(max_norm: float, total_norm: float) -> float: ...
@overload
def clip_coefficient(max_norm: float, total_norm: Tensor) -> Tensor: ...


def clip_coefficient(max_norm: float, total_norm: float | Tensor) -> float | Tensor:
    """What gradients are multiplied by, ``min(1, max_norm / (total_norm + 1e-6))``; NaN for a NaN norm."""
    rate = max_norm / (total_norm + 1e-6)
    if isinstance(rate, float):
        # An infinite threshold only measures, also where the norm is infinite or NaN.
        return 1.0 if rate >= 1.0 or max_norm == math.inf else rate
    return torch.ones_like(rate) if max_norm == math.inf else rate.clamp(max=1.0)


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float | str = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: ProcessGroup | Sequence[ProcessGroup] | None = None,
) -> Tensor:
    r"""Scale all gradients together so that their joint norm is at most ``max_norm``.

    The drop-in for ``torch.nn.utils.clip_grad_norm_``.  All gradients are one vector; with its norm,
    every gradient is multiplied by:

        min(1, max_norm / (total_norm + 1e-6))

    The norm is accumulated in float64, the coefficient computed in float64.  Gradients in CPU memory are not
    touched where no clipping is needed; on an accelerator nothing waits for the device.  Of DTensors the norm
    is that of the full tensors, the same on every rank, on any mixture of meshes.

    Args:
        parameters: tensors whose ``.grad`` is scaled in place, or a single one.  Those without a gradient are
            passed over; one that is listed twice counts once.
        max_norm: the threshold, at least 0. ``float("inf")`` only measures.
        norm_type: the order of the norm, any number or ``"inf"``.
        error_if_nonfinite: raise if the norm is ``inf`` or ``nan``, before anything is changed.  By default
            it is returned, and spreads to all gradients.  It is the norm that is looked at, as in torch: of
            an order of 0 or less it may be finite though a gradient is not.
        foreach: accepted for compatibility, without effect.
        group: a process group, or several, whose other ranks hold further gradients (pipeline stages, shards
            made by hand); all of its ranks must make the call.  DTensors need none.

    Returns:
        The norm before clipping, a 0-dim tensor on the device of the first gradient: float64 if any gradient
        is float64 or complex128, else float32.

    Raises:
        TypeError: for anything but tensors in ``parameters``, an integer gradient, a ``max_norm`` or
            ``norm_type`` that is not a number, or a ``group`` that is no process group.
        ValueError: if ``max_norm`` is negative or NaN, or ``norm_type`` is NaN.
        RuntimeError: if a gradient is an expanded tensor; if ``error_if_nonfinite`` and the norm is not
            finite (the message names the gradients).

    References:
        Pascanu, Mikolov and Bengio, *On the difficulty of training recurrent neural networks*, 2013, section
        3.2, https://arxiv.org/abs/1211.5063; *Deep Learning from Scratch 2*, section 6.1.4.

    Examples:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> clip_grad_norm_(weight, max_norm=1.0)
        tensor(5.)
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    max_norm = threshold("max_norm", max_norm)
    p = norm_order(norm_type)
    error_if_nonfinite = error_if_nonfinite is not False and flag("error_if_nonfinite", error_if_nonfinite)
    batch = gradients.of_parameters(parameters, group)
    total_norm = gradients.norm(batch, p)
    if error_if_nonfinite:
        refuse_nonfinite(total_norm, p, batch.all)
    gradients.scale_(batch, clip_coefficient(max_norm, total_norm))
    return as_result(total_norm, batch)


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float | str = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: ProcessGroup | Sequence[ProcessGroup] | None = None,
) -> Tensor:
    """The norm of all tensors, taken as one vector.

    The drop-in for ``torch.nn.utils.get_total_norm``.  Unlike the ``clip`` functions it takes the tensors
    (gradients) themselves.  Nothing is modified.

    Args:
        tensors: the tensors, or a single one; one that is listed twice counts once.
        norm_type: the order of the norm, any number or ``"inf"``.
        error_if_nonfinite: raise if the norm is ``inf`` or ``nan``, as for ``clip_grad_norm_``.
        foreach: accepted for compatibility, without effect.
        group: as for ``clip_grad_norm_``.

    Returns:
        A 0-dim tensor on the device of the first one, float64 if any tensor is float64 or complex128, else
        float32.  ``tensor(0.)`` for no tensors.

    Raises:
        TypeError: for anything but tensors, a ``norm_type`` that is not a number, or a ``group`` that is no
            process group.
        ValueError: if ``norm_type`` is NaN.
        RuntimeError: if ``error_if_nonfinite`` and the norm is not finite.

    Examples:
        >>> get_total_norm([torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    p = norm_order(norm_type)
    error_if_nonfinite = error_if_nonfinite is not False and flag("error_if_nonfinite", error_if_nonfinite)
    batch = gradients.of_tensors(tensors, group)
    total_norm = gradients.norm(batch, p)
    if error_if_nonfinite:
        remedy = "To disable this error and get the non-finite norm, set `error_if_nonfinite=False`"
        refuse_nonfinite(total_norm, p, batch.all, remedy=remedy, argument="tensors")
    return as_result(total_norm, batch)


def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    total_norm: Tensor | float,
    foreach: bool | None = None,
) -> None:
    """Scale all gradients as ``clip_grad_norm_`` does, with a norm that was computed before.

    The drop-in for ``torch.nn.utils.clip_grads_with_norm_``.  Every gradient is multiplied by:

        min(1, max_norm / (total_norm + 1e-6))

    Args:
        parameters: tensors whose ``.grad`` is scaled in place, or a single one.
        max_norm: the threshold, at least 0.
        total_norm: the norm to compare with it, from ``get_total_norm``; a number, or a tensor (also a
            DTensor) of one element.
        foreach: accepted for compatibility, without effect.

    Raises:
        TypeError: for anything but tensors in ``parameters`` and numbers in the others, or an integer
            gradient.
        ValueError: if ``max_norm`` is negative or NaN, or ``total_norm`` is negative; on an accelerator,
            where that cannot be seen without waiting, the gradients become NaN instead.
        RuntimeError: if a gradient is an expanded tensor.

    Examples:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grads_with_norm_(weight, 1.0, get_total_norm(weight.grad))
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    max_norm = threshold("max_norm", max_norm)
    norm = _as_norm(total_norm)
    batch = gradients.of_parameters(parameters)
    gradients.scale_(batch, clip_coefficient(max_norm, norm))


def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None
) -> None:
    """Limit every single element of the gradients to ``[-clip_value, clip_value]``.

    The drop-in for ``torch.nn.utils.clip_grad_value_``.  Unlike clipping by norm this turns the direction
    of the step.

    Args:
        parameters: tensors whose ``.grad`` is changed in place, or a single one.
        clip_value: the largest magnitude allowed, at least 0. NaN in a gradient stays NaN.
        foreach: accepted for compatibility, without effect.

    Raises:
        TypeError: for anything but tensors in ``parameters``, an integer or complex gradient, or a
            ``clip_value`` that is not a number.
        ValueError: if ``clip_value`` is negative or NaN.
        RuntimeError: if a gradient is an expanded tensor.

    Examples:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> weight.grad = torch.tensor([-3.0, 0.5])
        >>> clip_grad_value_(weight, 1.0)
        >>> weight.grad
        tensor([-1.0000,  0.5000])
    """
    clip_value = threshold("clip_value", clip_value)
    batch = gradients.of_parameters(parameters)
    if batch.facts & Facts.COMPLEX or (batch.rest and any(grad.is_complex() for grad in batch.rest)):
        raise TypeError(
            "`parameters` has complex gradients, and complex numbers have no order to limit them by value; "
            "clip by norm instead (clip_grad_norm_)"
        )
    gradients.clamp_(batch, clip_value)


def clip_grad_norm_per_parameter_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float | str = 2.0
) -> Tensor:
    """Clip each gradient to ``max_norm`` on its own, as if the others were not there.

    Args:
        parameters: tensors whose ``.grad`` is scaled in place, or a single one.
        max_norm: the threshold for each gradient's norm, at least 0. ``float("inf")`` only measures.
        norm_type: the order of the norm, any number or ``"inf"``.

    Returns:
        The norms before clipping, in the order of the distinct gradients: a tensor of shape ``(gradients,)``,
        of dtype and device as ``clip_grad_norm_`` returns them.

    Raises:
        TypeError: for anything but tensors in ``parameters``, an integer gradient, or a ``max_norm`` or
            ``norm_type`` that is not a number.
        ValueError: if ``max_norm`` is negative or NaN, or ``norm_type`` is NaN.
        RuntimeError: if a gradient is an expanded tensor.

    Examples:
        >>> a, b = (torch.zeros(2, requires_grad=True) for _ in range(2))
        >>> a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])
        >>> clip_grad_norm_per_parameter_([a, b], max_norm=1.0)
        tensor([5.0000, 0.5000])
        >>> a.grad, b.grad
        (tensor([0.6000, 0.8000]), tensor([0.3000, 0.4000]))
    """
    max_norm = threshold("max_norm", max_norm)
    p = norm_order(norm_type)
    batch = gradients.of_parameters(parameters)
    norms = gradients.norms(batch, p)
    gradients.scale_each_(batch, [clip_coefficient(max_norm, n) for n in norms])
    return as_results(norms, batch)


def clip_grad_adaptive_(
    parameters: Tensor | Iterable[Tensor],
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    norm_type: float | str = 2.0,
) -> None:
    r"""Adaptive gradient clipping (AGC): each unit's gradient relative to the norm of the unit's own weights.

    For the i-th unit (row, output channel) of every weight ``W`` with gradient ``G``:

        G_i ← λ max(‖W_i‖, eps) / ‖G_i‖ · G_i    if ‖G_i‖ > λ max(‖W_i‖, eps)

    The units of a parameter with two or more axes lie along its first axis; a vector or a scalar is one unit.
    The paper leaves the last linear layer out: do not pass its parameters.

    Args:
        parameters: tensors whose ``.grad`` is scaled in place, or a single one.  Their values stay.
        clip_factor: the largest ratio of the two norms, at least 0 (``λ`` in the paper).
        eps: the least weight norm that counts, so that weights that start at zero can move.
        norm_type: the order of the norm, any number or ``"inf"``.

    Raises:
        TypeError: for anything but tensors in ``parameters`` and numbers in the others, an integer gradient,
            a sparse gradient that is not made of whole rows (as those of ``torch.nn.Embedding`` are), or a
            DTensor gradient that is not split as its parameter is.
        ValueError: if ``clip_factor`` or ``eps`` is negative or NaN, or ``norm_type`` is NaN.
        RuntimeError: if a gradient is an expanded tensor.

    References:
        Brock, De, Smith and Simonyan, *High-Performance Large-Scale Image Recognition Without Normalization*,
        2021, section 4, https://arxiv.org/abs/2102.06171

    Examples:
        >>> weight = torch.tensor([[6.0, 8.0], [6.0, 8.0]], requires_grad=True)
        >>> weight.grad = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> clip_grad_adaptive_(weight, clip_factor=0.1)
        >>> weight.grad
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    clip_factor = threshold("clip_factor", clip_factor)
    eps = threshold("eps", eps)
    p = norm_order(norm_type)
    of_parameters = units.of_parameters(parameters)
    for each, (of_weight, of_grad) in zip(of_parameters, units.norms(of_parameters, p), strict=True):
        limits = clip_factor * of_weight.clamp(min=eps)
        # A NaN compares false, and spreads through its unit.
        factors = torch.where(of_grad <= limits, 1.0, limits / of_grad)
        if not (eager.on_host([factors]) and bool((factors == 1).all())):
            units.scale_(each, factors)


def clip_per_example(grads: Tensor | Sequence[Tensor], max_norm: float) -> tuple[list[Tensor], Tensor]:
    r"""Clip each example's gradient, then add the examples up: the clipping step of DP-SGD.

    Example ``i`` owns slice ``i`` of every tensor, and its norm is taken over all of them:

        sums = Σ_i min(1, max_norm / (‖g_i‖ + 1e-6)) g_i

    For differential privacy, add noise of standard deviation ``noise_multiplier * max_norm`` to the sums and
    divide by the batch size.

    Args:
        grads: one tensor a parameter, of shape ``(examples, *parameter.shape)``, as
            ``torch.func.vmap(torch.func.grad(loss), ...)`` gives them.  Not modified.
        max_norm: the threshold for each example's norm, at least 0.

    Returns:
        The sums of the clipped gradients, of the parameters' shapes and dtypes, and the number of examples
        that were clipped (0-dim, int64).

    Raises:
        TypeError: for anything but dense floating or complex tensors in ``grads``.
        ValueError: if the tensors differ in their number of examples, or ``max_norm`` is negative or NaN.

    References:
        Abadi et al., *Deep Learning with Differential Privacy*, 2016, algorithm 1,
        https://arxiv.org/abs/1607.00133

    Examples:
        >>> sums, clipped = clip_per_example([torch.tensor([[3.0, 4.0], [0.03, 0.04]])], max_norm=0.5)
        >>> sums, clipped
        ([tensor([0.3300, 0.4400])], tensor(1))
    """
    max_norm = threshold("max_norm", max_norm)
    tensors = _examples(grads)
    if not tensors:
        return [], torch.tensor(0, device="cpu")
    with torch.no_grad():
        device = tensors[0].device
        norms = torch.stack([eager.row_norms(g, 2.0).to(device) for g in tensors], dim=-1)
        factors = clip_coefficient(max_norm, combine_tensors(norms, 2.0))
        return [_weighted_sum(g, factors) for g in tensors], (~(factors >= 1)).sum()


def _examples(grads: Tensor | Sequence[Tensor]) -> list[Tensor]:
    tensors = tensor_list("grads", grads)
    for i, grad in enumerate(tensors):
        if not isinstance(grad, Tensor):
            refuse_item("grads", i, grad)
        if grad.layout != torch.strided or not (grad.is_floating_point() or grad.is_complex()):
            raise TypeError(
                f"`grads` must hold dense floating tensors, item {i} is {grad.layout} {grad.dtype}"
            )
    if any(g.dim() == 0 for g in tensors) or len({len(g) for g in tensors}) > 1:
        raise ValueError(
            "every tensor in `grads` must have the same number of examples along its first axis, "
            f"got shapes {[tuple(g.shape) for g in tensors]}"
        )
    return tensors


def _weighted_sum(grad: Tensor, factors: Tensor) -> Tensor:
    # On mps, which has no float64, float32, and then autocast must not narrow the product.
    wide = torch.promote_types(grad.dtype, norm_dtype(grad.device))
    factors = factors.to(grad.device, wide)
    rows = grad.reshape(len(grad), math.prod(grad.shape[1:]))
    with torch.autocast("mps", enabled=False) if grad.device.type == "mps" else nullcontext():
        # By pieces, so that the copies do not grow with the gradients.
        pieces = torch.split(rows, max(1, _PIECE // max(1, len(rows))), dim=1)
        total = torch.cat([factors @ piece.to(wide) for piece in pieces])
    return total.to(grad.dtype).view(grad.shape[1:])


def _as_norm(total_norm: Tensor | float) -> float | Tensor:
    """A norm that the user computed: left on its device if it is on one."""
    if isinstance(total_norm, Tensor) and not eager.on_host([total_norm]):
        if total_norm.numel() != 1 or total_norm.is_complex():
            raise TypeError(
                f"`total_norm` must be a number, got a tensor of shape {tuple(total_norm.shape)} and dtype "
                f"{total_norm.dtype}"
            )
        norm = full(total_norm.detach()).to(norm_dtype(total_norm.device)).view(())
        # Nobody waits to see whether it is negative; NaN shows that it was, and turns no gradient around.
        return torch.where(norm < 0, math.nan, norm)
    value = number("total_norm", total_norm)
    if value < 0:
        raise ValueError(f"`total_norm` must be at least 0, got {shown(value)}")
    return value
