"""Shared by the tests of frameworks."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import torchclip

MAX_NORM = 0.5


@contextlib.contextmanager
def counted(*names: str) -> Iterator[list[Any]]:
    """Torchclip installed, with the calls of some functions counted."""
    calls: list[Any] = []

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(function(*args, **kwargs))
            return calls[-1]

        return call

    with torchclip.installed(), pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(torch.nn.utils, name, counting(getattr(torch.nn.utils, name)))
        yield calls


OF_ACCELERATE = ("clip_grad_norm_", "get_total_norm")
"""What Accelerate clips by: the first until 1.15, then the second, followed by ``clip_grads_with_norm_``."""


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerances: Any) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], **tolerances)


def data(batch_size: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 4, generator=generator)
    return DataLoader(TensorDataset(x, 10 * x.sum(1, keepdim=True)), batch_size)
