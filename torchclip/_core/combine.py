"""One norm from the norms of parts: ``(Σ n^p)^(1/p)``, without overflow or underflow on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

__all__ = ["ABSENT", "combine", "combine_tensors", "join", "join_tensors", "norm_dtype", "stacked"]

ABSENT = -1.0
"""What stands for the norm of no elements at all; it changes no joint norm, of whatever order."""


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


def join(norms: Sequence[float | Tensor], p: float) -> float | Tensor:
    """The joint norm, some of the norms perhaps on an accelerator; ``ABSENT`` for none, or if all are."""
    if len(norms) == 1:
        return norms[0]
    device = next((norm.device for norm in norms if isinstance(norm, Tensor)), None)
    if device is None:
        present = [norm for norm in cast("Sequence[float]", norms) if not norm < 0]
        return combine(present, p) if present else ABSENT
    return join_tensors(stacked(norms, device), p)


def join_tensors(norms: Tensor, p: float) -> Tensor:
    """``join`` along the last dimension of a tensor."""
    absent = norms < 0
    result = combine_tensors(norms.masked_fill(absent, math.inf if p < 0 else 0.0), p)
    return result.masked_fill(absent.all(dim=-1), ABSENT)


def stacked(norms: Sequence[float | Tensor], device: torch.device | str) -> Tensor:
    """Norms as a tensor of one dimension."""
    dtype = norm_dtype(torch.device(device))
    if not any(isinstance(norm, Tensor) for norm in norms):
        return torch.tensor(norms, dtype=dtype, device=device)
    return torch.stack([torch.as_tensor(norm, dtype=dtype, device=device) for norm in norms])


def norm_dtype(device: torch.device) -> torch.dtype:
    """The dtype that norms have on a device: float64, but float32 on mps, which has no wider one."""
    return torch.float32 if device.type == "mps" else torch.float64
