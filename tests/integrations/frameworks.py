"""Shared by the tests of frameworks."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import torchclip

MAX_NORM = 0.5


@contextlib.contextmanager
def counted(name: str) -> Iterator[list[Any]]:
    """Torchclip installed, with the calls of one function counted."""
    calls = []
    with torchclip.installed():
        function = getattr(torch.nn.utils, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            calls.append(function(*args, **kwargs))
            return calls[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.utils, name, counting)
            yield calls


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerances: Any) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], **tolerances)


def data(batch_size: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 4, generator=generator)
    return DataLoader(TensorDataset(x, 10 * x.sum(1, keepdim=True)), batch_size)
