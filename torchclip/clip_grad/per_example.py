"""Clipping each example, then adding the examples: the step of DP-SGD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from torchclip._core import memory, native, rows
from torchclip._core.arguments import check_tensor, tensor_list, threshold
from torchclip._core.joint_norms import join_rows
from torchclip._core.scalars import clip_coef

__all__ = ["clip_per_example"]

# The number of elements copied at a time: in host memory few enough to stay in the cache.
_PIECE_ON_HOST, _PIECE = 1 << 17, 1 << 24


def clip_per_example(grads: Tensor | Sequence[Tensor], max_norm: float) -> tuple[list[Tensor], Tensor]:
    r"""Clip the gradient of each example, then add the examples: the clipping step of DP-SGD.

    The gradient ``g_i`` of example ``i`` is slice ``i`` of all tensors together:

        sums = Σ_i min(1, max_norm / (‖g_i‖ + 1e-6)) g_i

    For differential privacy, add noise of standard deviation ``noise_multiplier * max_norm`` to the sums and
    divide by the batch size.  This function does neither, and it does no privacy accounting.
    ``torchclip.QuantileTracker`` finds a ``max_norm``: pass the share of examples that were not clipped,
    ``1 - clipped / examples``, to its ``update``.

    Args:
        grads: one tensor per parameter, of shape ``(examples, *parameter.shape)``, as from
            ``torch.func.vmap(torch.func.grad(loss), ...)``.  Not modified.
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
    tensors = tensor_list("grads", grads)
    if not is_dynamo_compiling():
        short = native.clip_per_example(tensors, max_norm)
        if short is not None:
            return short
    _check(tensors)
    if not tensors:
        return [], torch.tensor(0, device="cpu")
    with torch.no_grad():
        device = tensors[0].device
        norms = torch.stack([norms.to(device) for norms in rows.norms_of_rows(tensors, 2.0)], dim=-1)
        clip_coefs = clip_coef(max_norm, join_rows(norms, 2.0))
        # On mps, which has no float64, products are in float32, and autocast must not narrow them.
        with (
            torch.autocast("mps", enabled=False)
            if any(g.device.type == "mps" for g in tensors)
            else nullcontext()
        ):
            sums = [_weighted_sum(g, clip_coefs) for g in tensors]
        return sums, (~(clip_coefs >= 1)).sum()


def _check(tensors: list[Tensor]) -> None:
    for i, grad in enumerate(tensors):
        check_tensor("grads", i, grad)
        if grad.layout != torch.strided or not (grad.is_floating_point() or grad.is_complex()):
            raise TypeError(
                f"`grads` must hold dense floating tensors, item {i} is {grad.layout} {grad.dtype}"
            )
    memory.check_has_memory(tensors, "grads")
    if any(g.dim() == 0 for g in tensors) or len({len(g) for g in tensors}) > 1:
        raise ValueError(
            "every tensor in `grads` must have the same number of examples along its first axis, "
            f"got shapes {[tuple(g.shape) for g in tensors]}"
        )


def _weighted_sum(grad: Tensor, clip_coefs: Tensor) -> Tensor:
    wide = torch.promote_types(grad.dtype, clip_coefs.dtype)
    clip_coefs = clip_coefs.to(grad.device, wide)
    examples = grad.reshape(len(grad), math.prod(grad.shape[1:]))
    most = _PIECE_ON_HOST if grad.is_cpu else _PIECE
    pieces = torch.split(examples, max(1, most // max(1, len(examples))), dim=1)
    sums = [(clip_coefs @ piece.to(wide)).to(grad.dtype) for piece in pieces]
    total = sums[0] if len(sums) == 1 else torch.cat(sums)
    return total.view(grad.shape[1:])
