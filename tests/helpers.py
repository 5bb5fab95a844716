"""Shared by the test modules: gradients to clip, and exact norms."""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchclip
from torchclip._core import memory, native
from torchclip.history import Record

INF = math.inf
NORM_TYPES: list[float | str] = [0, 0.5, 1, 2, 3, INF, -INF, "inf"]
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
]
LOW_PRECISION = {torch.float16, torch.bfloat16}


def with_gradients(gradients: Sequence[Tensor | None], values: Sequence[Tensor] | None = None) -> list[Any]:
    """Parameters with these gradients, and with these values or zeros.

    They pass for anything, so that a test can use a gradient that is there without asking whether it is.
    """
    parameters = []
    for i, gradient in enumerate(gradients):
        value = torch.zeros(2) if gradient is None else torch.zeros(gradient.shape, dtype=gradient.dtype)
        parameter = nn.Parameter(value if values is None else values[i])
        parameter.grad = gradient
        parameters.append(parameter)
    return parameters


@contextmanager
def interrupted_sgd() -> Iterator[None]:
    """Makes a step of torch's SGD fail in the middle, after all hooks before it."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["torch.optim.sgd"], "sgd", interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield


def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has tensors in host memory treated as those on a device, whose values must not be read."""
    monkeypatch.setattr(memory, "on_host", lambda tensors: False)
    monkeypatch.setattr(memory, "common_dtype", lambda tensors: None)


def is_as_on_an_accelerator() -> bool:
    """Whether ``as_on_an_accelerator`` is in effect."""
    return not memory.on_host([])


class Operations(TorchDispatchMode):
    """Names of the operations that reach the dispatcher, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers that are the same every time."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return (torch.randn(shape, dtype=wide, generator=generator) * scale).to(dtype)


def random_gradients(shapes: Sequence[Sequence[int]], dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    return [randn(*shape, dtype=dtype, seed=i, scale=scale) for i, shape in enumerate(shapes)]


def as_numpy(tensor: Tensor) -> np.ndarray:
    """A copy of the values; NumPy has no bfloat16, float32 holds its numbers."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).resolve_conj().numpy().copy()


def assert_same_up_to_rounding(actual: Tensor, expected: np.ndarray) -> None:
    """Each number within two units in the last place of the tensor's dtype."""
    info = torch.finfo(actual.dtype)
    # The twin adds in another order, which shows in float64, and more so on an accelerator.
    order = 5e-14 if is_as_on_an_accelerator() else 2e-14
    close: dict[str, Any] = {"rtol": max(2 * info.eps, order), "atol": 2 * info.smallest_normal * info.eps}
    np.testing.assert_allclose(as_numpy(actual), expected, **close)


def grad_of(parameter: Tensor) -> Tensor:
    """The gradient of a parameter that has one."""
    assert parameter.grad is not None
    return parameter.grad


def last_of(clipper: torchclip.Clipper) -> Record:
    """The record of the last step; there must be one."""
    assert clipper.last is not None
    return clipper.last


def bits(tensor: Tensor) -> bytes:
    return (
        tensor.detach()
        .clone(memory_format=torch.contiguous_format)
        .view(-1)
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )


def instruction_sets() -> list[str]:
    """Those of this machine that the kernel can use; none where it is off."""
    found = []
    for name in ("avx512", "avx2", "baseline") if native.active() else ():
        with suppress(ValueError):
            native.extension.select(name)
            found.append(name)
            native.extension.select(None)
    return found


def exact_norm(values: Sequence[float]) -> float:
    """The 2-norm, rounded once: rational numbers, and an integer square root of 200 binary digits."""
    total = sum((Fraction(v) ** 2 for v in values), Fraction(0))
    if total == 0:
        return 0.0
    shift = 200 - (total.numerator.bit_length() - total.denominator.bit_length()) // 2
    root = math.isqrt(math.floor(total * Fraction(4) ** shift))
    return float(Fraction(root) / Fraction(2) ** shift)
