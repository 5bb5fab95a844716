"""One norm from the norms of parts: ``(Σ n^p)^(1/p)``, without overflow or underflow on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["combine", "combine_tensors"]


def combine(norms: Sequence[float], p: float) -> float:
    """The norm of order ``p`` of a vector whose parts have these norms; 0.0 for no parts.

    Parts without elements must be left out: for ``p < 0`` a norm of 0 means a zero element.
    """
    if len(norms) < 2:
        return norms[0] if norms else 0.0
    if any(n != n for n in norms):
        return math.nan
    if p == 0:
        return math.fsum(norms)
    # Divided by the leading one, no power leaves the range, whatever p is.
    leading = max(norms) if p > 0 else min(norms)
    if math.isinf(p) or leading == 0 or math.isinf(leading):
        return leading
    powers = math.fsum((n / leading) ** p for n in norms)
    # With logarithms where the root alone would leave the range, as it does for a small p.
    exponent = math.log(powers) / p
    if abs(exponent) < 600:
        return float(leading * powers ** (1 / p))
    return math.inf if exponent + math.log(leading) > 709 else math.exp(exponent + math.log(leading))


def combine_tensors(norms: Tensor, p: float) -> Tensor:
    """``combine`` along the last dimension of a tensor, without waiting for its device."""
    if norms.shape[-1] == 0:
        return norms.new_zeros(norms.shape[:-1])
    if p == 0:
        return norms.sum(dim=-1)
    leading = norms.amax(dim=-1) if p > 0 else norms.amin(dim=-1)
    if math.isinf(p):
        return leading
    regular = (leading > 0) & torch.isfinite(leading)
    divisor = torch.where(regular, leading, 1.0).unsqueeze(-1)
    sums = (norms / divisor).pow(p).sum(dim=-1)
    return torch.where(regular, leading * sums.pow(1 / p), leading)
