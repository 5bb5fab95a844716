"""Adaptive gradient clipping: each unit relative to the norm of its own weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torchclip._core import arguments, gather, memory, native, units
from torchclip._core.arguments import norm_type_of, threshold

__all__ = ["Adaptive", "clip_grad_adaptive_"]


def clip_grad_adaptive_(
    parameters: Tensor | Iterable[Tensor] | nn.Module,
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    norm_type: float | str = 2.0,
) -> None:
    r"""Adaptive gradient clipping (AGC): each unit's gradient relative to the norm of the unit's own weights.

    For the i-th unit (row, output channel) of every weight ``W`` with gradient ``G``:

        G_i ← λ max(‖W_i‖, eps) / ‖G_i‖ · G_i    if ‖G_i‖ > λ max(‖W_i‖, eps)

    The units of a parameter with two or more axes are its slices along the first axis.  A vector or a scalar
    is one unit.  A gradient that several parameters share is multiplied once, by the smallest of its
    coefficients.  The paper does not clip the last linear layer, so do not pass its parameters.

    Args:
        parameters: tensors whose ``.grad`` is scaled in place, a single one, or a module (its parameters).
            Their values do not change.
        clip_factor: the largest ratio of the two norms, at least 0 (``λ`` in the paper).
        eps: a lower bound for the norm of the weights, so that weights that start at zero can move.
        norm_type: the order of the norm, any number or ``"inf"``.

    Raises:
        TypeError: for anything but tensors in ``parameters`` and numbers in the other arguments, an integer
            gradient, a sparse gradient that does not consist of whole rows (those of ``torch.nn.Embedding``
            do), or a DTensor gradient that is not split like its parameter.
        ValueError: if ``clip_factor`` or ``eps`` is negative or NaN, or ``norm_type`` is NaN.
        RuntimeError: if elements of a gradient share memory, as those of an expanded tensor do.

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
    try:
        clip_factor = threshold("clip_factor", clip_factor)
        eps = threshold("eps", eps)
        p = norm_type_of(norm_type)
    except (TypeError, ValueError):
        units.tell_ranks(parameters)
        raise
    _clip(parameters, clip_factor, eps, p)


def _clip(
    parameters: Tensor | Iterable[Tensor] | nn.Module,
    clip_factor: float,
    eps: float,
    p: float,
    grad_scale: Tensor | None = None,
) -> None:
    if not is_dynamo_compiling() and (grad_scale is None or memory.on_host([grad_scale])):
        scale = 1.0 if grad_scale is None else float(grad_scale)
        if native.clip_grad_adaptive(parameters, clip_factor, eps, p, scale) is not None:
            return
    items = arguments.tensor_list("parameters", parameters)
    if not items:
        gather.warn_if_used_up(parameters)
    found = units.of_parameters(items, parameters)
    if not found:
        gather.warn_of_gradients(items)
    norms = units.norms(found, p, eps)
    units.scale_(found, _clip_coefs(norms, clip_factor, grad_scale))


def _clip_coefs(
    norms: Sequence[tuple[Tensor, Tensor]], clip_factor: float, grad_scale: Tensor | None
) -> Sequence[Tensor]:
    if len({of_weight.device for of_weight, _ in norms}) != 1:
        return [_clip_coef(*of_units, clip_factor, grad_scale) for of_units in norms]
    # All at once, because each operation takes time.
    weights, grads = (torch.cat(of_all) for of_all in zip(*norms, strict=True))
    of_all = _clip_coef(weights, grads, clip_factor, grad_scale)
    return torch.split(of_all, [of_weight.numel() for of_weight, _ in norms])


def _clip_coef(of_weight: Tensor, of_grad: Tensor, clip_factor: float, grad_scale: Tensor | None) -> Tensor:
    limits = clip_factor * of_weight
    if grad_scale is not None:
        limits = limits * grad_scale.to(limits)
    # A NaN compares false, and spreads through its unit.
    return (limits / of_grad).masked_fill(of_grad <= limits, 1.0)


@dataclass(eq=False)
class Adaptive:
    """``clip_grad_adaptive_`` as a rule for a ``Clipper``: ``Clipper(optimizer, Adaptive())``.

    The paper does not clip the last linear layer: give its parameter group ``"max_norm": None``.

    Args:
        clip_factor: the largest ratio of a unit's gradient norm to the norm of its weights, at least 0.
        eps: a lower bound for the norm of the weights, so that weights that start at zero can move.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if an argument is negative or NaN.

    References:
        Brock, De, Smith and Simonyan, *High-Performance Large-Scale Image Recognition Without Normalization*,
        2021, section 4, https://arxiv.org/abs/2102.06171

    Examples:
        >>> Adaptive()
        Adaptive(clip_factor=0.01, eps=0.001)
    """

    clip_factor: float = 0.01
    eps: float = 1e-3

    def __post_init__(self) -> None:
        self.clip_factor = threshold("clip_factor", self.clip_factor)
        self.eps = threshold("eps", self.eps)

    def clip_(self, parameters: Sequence[Tensor], grad_scale: Tensor | None = None) -> None:
        """Clip the gradients of the parameters in place."""
        _clip(parameters, self.clip_factor, self.eps, 2.0, grad_scale)
