"""Prints a digest of the kernel's results for given numbers, which must not depend on the platform."""

import hashlib
import math

import numpy as np
import torch

import torchclip

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)


def gradient(dtype: torch.dtype, size: int) -> torch.Tensor:
    """Numbers of many magnitudes, made of integers, which are the same everywhere."""
    generator = np.random.default_rng(size)
    integers = generator.integers(-(1 << 11), 1 << 11, (2, size)) * 2.0 ** generator.integers(
        -12, 4, (2, size)
    )
    numbers = torch.from_numpy(integers)
    return (torch.complex(*numbers) if dtype.is_complex else numbers[0]).to(dtype)


def main() -> None:
    """Norms of all kinds and clipped gradients, for every dtype."""
    digest = hashlib.sha256()
    for dtype in DTYPES:
        gradients = [gradient(dtype, size) for size in (1, 7, 100, 70_001)]
        for order in (0.0, 1.0, 2.0, math.inf):
            digest.update(torchclip.get_total_norm(gradients, order).numpy().tobytes())
        parameters = [torch.nn.Parameter(torch.zeros_like(each)) for each in gradients]
        for parameter, each in zip(parameters, gradients, strict=True):
            parameter.grad = each.clone()
        torchclip.clip_grad_norm_(parameters, 1.0)
        for parameter in parameters:
            assert parameter.grad is not None
            digest.update(parameter.grad.view(torch.uint8).numpy().tobytes())
    print(digest.hexdigest()[:16])


if __name__ == "__main__":
    main()
