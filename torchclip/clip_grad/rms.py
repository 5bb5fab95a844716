"""Clipping each gradient by its root mean square."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torchclip._core import gather, memory, native
from torchclip._core.arguments import threshold
from torchclip._core.batch import Batch, Facts, Norms, clip_each_, to_results
from torchclip._core.ranks.exchange import Kind
from torchclip._core.scalars import clip_coefs, divided, numbers, on_device

__all__ = ["BlockRMS", "clip_grad_rms_"]

# A power of two by which the norm of any gradient in memory fits into float64.
_SCALE = 2.0**-64


def clip_grad_rms_(parameters: Tensor | Iterable[Tensor] | nn.Module, max_rms: float) -> Tensor:
    r"""Clip each gradient by itself, to a root mean square of at most ``max_rms``.

    For a gradient ``g`` of ``n`` elements (those of the full tensor, if it is a DTensor):

        rms(g) = ‖g‖ / √n                g ← min(1, max_rms / rms(g)) g

    Unlike a threshold for the norm, one number fits large and small parameters.  optax calls this rule
    ``clip_by_block_rms``, and Adafactor clips its updates by it.

    Args:
        parameters: tensors whose ``.grad`` is scaled in place, a single one, or a module (its parameters).
        max_rms: the threshold for the root mean square of each gradient, at least 0. ``float("inf")`` only
            measures.

    Returns:
        The root mean squares before clipping, in the order of the distinct gradients: a tensor of shape
        ``(gradients,)``, with the dtype and device that ``clip_grad_norm_`` returns.

    Raises:
        TypeError: for anything but tensors in ``parameters``, an integer gradient, or a ``max_rms`` that is
            not a number.
        ValueError: if ``max_rms`` is negative or NaN.
        RuntimeError: if elements of a gradient share memory, as those of an expanded tensor do.

    References:
        Shazeer and Stern, *Adafactor: Adaptive Learning Rates with Sublinear Memory Cost*, 2018, section 6,
        https://arxiv.org/abs/1804.04235

    Examples:
        >>> import torch
        >>> a, b = torch.zeros(2, requires_grad=True), torch.zeros(8, requires_grad=True)
        >>> a.grad, b.grad = torch.full((2,), 4.0), torch.full((8,), 0.5)
        >>> clip_grad_rms_([a, b], max_rms=1.0)
        tensor([4.0000, 0.5000])
        >>> a.grad, b.grad[0]
        (tensor([1., 1.]), tensor(0.5000))
    """
    if not is_dynamo_compiling():
        short = native.clip_grad_each(parameters, max_rms, 2.0, True)
        if short is not None:
            return short
    try:
        max_rms = threshold("max_rms", max_rms)
    except (TypeError, ValueError):
        gather.tell_ranks([parameters], None, Kind.CLIP_EACH)
        raise
    batch = gather.gradients(parameters, kind=Kind.CLIP_EACH)
    return to_results(_clip(batch, max_rms), batch)


def _clip(batch: Batch, max_rms: float) -> Norms:
    """Clip, and return the root mean squares before clipping."""
    roots = _roots(batch)
    if not batch.facts & (Facts.DOUBLE | Facts.SHARDED):
        # With limits for the norms, a gradient that is exactly at the limit does not change.
        return divided(clip_each_(batch, [max_rms * root for root in roots], 2.0, 0.0), roots)
    rms = _of_double(batch, roots)
    batch.scale_each_(clip_coefs(max_rms, rms, 0.0))
    return rms


def _of_double(batch: Batch, roots: list[float]) -> Norms:
    """The root mean squares of float64 gradients, which may fit into float64 even if the norms do not."""
    norms = batch.norms(2.0)
    if not isinstance(norms, list) or math.inf not in norms:
        return divided(norms, roots)
    scaled = numbers(gather.tensors([grad.detach() * _SCALE for grad in batch.all]).norms(2.0))
    return [
        by_scale / root / _SCALE if norm == math.inf else norm / root
        for norm, by_scale, root in zip(norms, scaled, roots, strict=True)
    ]


def _roots(batch: Batch) -> list[float]:
    """The square root of each gradient's number of elements; 1 for empty gradients."""
    return [math.sqrt(max(1, grad.numel())) for grad in batch.all]


@dataclass(eq=False)
class BlockRMS:
    """``clip_grad_rms_`` as a rule for a ``Clipper``: ``Clipper(optimizer, BlockRMS(1.0))``.

    Twin: ``torchclip.reference.clip_grad_rms``.

    Args:
        max_rms: the threshold for the root mean square of each gradient, at least 0.

    Raises:
        TypeError: if ``max_rms`` is not a number.
        ValueError: if ``max_rms`` is negative or NaN.

    Examples:
        >>> BlockRMS(1)
        BlockRMS(max_rms=1.0)
    """

    max_rms: float

    def __post_init__(self) -> None:
        self.max_rms = threshold("max_rms", self.max_rms)

    def clip_(self, parameters: Sequence[Tensor], grad_scale: Tensor | None = None) -> None:
        """Clip the gradients of the parameters in place."""
        if grad_scale is not None and not memory.on_host([grad_scale]):
            batch = gather.gradients(parameters, kind=Kind.CLIP_EACH)
            limits = on_device(_roots(batch), grad_scale.device) * (self.max_rms * grad_scale)
            clip_each_(batch, limits, 2.0, 0.0)
            return
        max_rms = self.max_rms * (1.0 if grad_scale is None else float(grad_scale))
        if is_dynamo_compiling() or native.clip_grad_each(parameters, max_rms, 2.0, True) is None:
            _clip(gather.gradients(parameters, kind=Kind.CLIP_EACH), max_rms)
