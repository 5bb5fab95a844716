"""A few numbers for each tensor, with which ranks compare weights and gradients without sending them."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from torchclip._core.scalars import norm_dtype

TOLERANCE = 1e-5
_PROJECTIONS = 4
_CHUNK = 1 << 18


class Fingerprint(NamedTuple):
    """The shape of a tensor, its norm, and its products with random vectors of 1 and -1."""

    shape: tuple[int, ...]
    norm: float
    projections: tuple[float, ...]

    def is_close(self, other: Fingerprint) -> bool:
        """Whether two tensors are the same up to rounding: they differ by at most 1e-5 of their norm.

        The root mean square of the differences between projections estimates the norm of the difference.
        """
        if self.shape != other.shape:
            return False
        if not (math.isfinite(self.norm) and math.isfinite(other.norm)):
            return math.isfinite(self.norm) == math.isfinite(other.norm)
        apart = math.dist(self.projections, other.projections) / math.sqrt(_PROJECTIONS)
        return max(apart, abs(self.norm - other.norm)) <= TOLERANCE * max(self.norm, other.norm)


def fingerprint(tensor: Tensor) -> Fingerprint:
    """The fingerprint of a tensor, from random numbers that are the same on all ranks."""
    flat = _flat(tensor)
    signs = _signs(flat.device)
    norms, total = [], torch.zeros(_PROJECTIONS, dtype=torch.float64, device=flat.device)
    generator = torch.Generator().manual_seed(1)
    for chunk in map(Tensor.double, torch.split(flat, _CHUNK)):
        # Without random weights, opposite changes in two chunks would cancel.
        weights = torch.randn(_PROJECTIONS, generator=generator, dtype=torch.float64, device="cpu")
        total += signs[:, : len(chunk)].mv(chunk) * weights.to(flat.device)
        norms.append(torch.linalg.vector_norm(chunk))
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return Fingerprint(tuple(tensor.shape), float(norm), tuple(total.tolist()))


@functools.cache
def _signs(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (_PROJECTIONS, _CHUNK), generator=generator, device="cpu") * 2 - 1
    return signs.double().to(device)


def _flat(tensor: Tensor) -> Tensor:
    """The elements of a tensor as real numbers in one dimension, on a device that has float64."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if norm_dtype(tensor.device) != torch.float64:
        tensor = tensor.cpu()
    return tensor.reshape(-1)
