"""Numbers that stand for a tensor, by which ranks compare weights and gradients without sending them."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from torchclip._core.scalars import norm_dtype
from torchclip.clip_grad.norm import get_total_norm

TOLERANCE = 1e-5
_PROJECTIONS = 4
_CHUNK = 1 << 18
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MULTIPLIER = 6364136223846793005  # odd, of 63 bits, as a change in any chunk must not vanish


class Fingerprints:
    """Computes them on the devices of the tensors, from random numbers that are the same on all ranks."""

    def __init__(self) -> None:
        self._random: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def of_bits(self, tensor: Tensor) -> int:
        """An integer for the bits of a tensor, its shape and its dtype; a changed bit changes it."""
        flat = _flat(tensor)
        factors, _ = self._numbers(flat.device)
        total = torch.zeros((), dtype=torch.int64, device=flat.device)
        for chunk in torch.split(flat.view(_INTEGERS[flat.element_size()]), _CHUNK):
            total = total * _MULTIPLIER + (chunk.long() * factors[: len(chunk)]).sum()
        kind = hashlib.blake2b(f"{tuple(tensor.shape)} {tensor.dtype}".encode(), digest_size=8).digest()
        return int(total) ^ int.from_bytes(kind, "little")

    def of_gradient(self, gradient: Tensor) -> tuple[float, tuple[float, ...]]:
        """The norm of a gradient, and its products with random vectors of 1 and -1."""
        flat = _flat(gradient)
        _, signs = self._numbers(flat.device)
        total = torch.zeros(_PROJECTIONS, dtype=torch.float64, device=flat.device)
        generator = torch.Generator().manual_seed(1)
        for chunk in torch.split(flat, _CHUNK):
            # Otherwise opposite changes in two chunks would cancel.
            weights = torch.randn(_PROJECTIONS, generator=generator, dtype=torch.float64, device="cpu")
            total += signs[:, : len(chunk)].mv(chunk.double()) * weights.to(flat.device)
        return float(get_total_norm(gradient)), tuple(total.tolist())

    def _numbers(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._random:
            generator = torch.Generator().manual_seed(0)
            factors = torch.randint(-(1 << 62), 1 << 62, (_CHUNK,), generator=generator, device="cpu") * 2 + 1
            signs = torch.randint(0, 2, (_PROJECTIONS, _CHUNK), generator=generator, device="cpu") * 2 - 1
            self._random[device] = factors.to(device), signs.double().to(device)
        return self._random[device]


def are_close(norms: tuple[float, float], projections: tuple[tuple[float, ...], tuple[float, ...]]) -> bool:
    """Whether two gradients are the same up to rounding: they differ by at most 1e-5 of their norm.

    The root mean square of the differences between projections estimates the norm of the difference.
    """
    if not all(map(math.isfinite, norms)):
        return not any(map(math.isfinite, norms))
    apart = math.dist(*projections) / math.sqrt(_PROJECTIONS)
    return max(apart, abs(norms[0] - norms[1])) <= TOLERANCE * max(norms)


def _flat(tensor: Tensor) -> Tensor:
    """The elements of a tensor as real numbers in one dimension, on a device that has float64."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if norm_dtype(tensor.device) != torch.float64:
        tensor = tensor.cpu()
    return tensor.contiguous().view(-1)
