"""Norms of few elements without the kernel: in NumPy, row by row in float32, and verified."""

import math

import numpy as np
import pytest
import torch
from helpers import exact_norm, randn

from torchclip import get_total_norm, kernel


@pytest.fixture(autouse=True)
def without_kernel():  # type: ignore[no-untyped-def]
    with kernel.disabled():
        yield


@pytest.mark.parametrize("vecdot", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_are_accurate(vecdot: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if not vecdot:  # as with NumPy before 2.0
        monkeypatch.delattr(np, "vecdot", raising=False)
    tensors = [randn(size, dtype=dtype) for size in (70_001, 1, 20_000, 500)]
    exact = math.sqrt(math.fsum(float(t.double().square().sum()) for t in tensors))
    assert float(get_total_norm(tensors)) == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
def test_where_rounding_errors_add_up(value: float) -> None:
    tensors = [torch.full((70_001,), value), torch.full((3,), value)]
    exact = math.sqrt(70_004) * float(tensors[0][0])
    assert float(get_total_norm(tensors)) == pytest.approx(exact, rel=1e-7)


def test_where_float32_leaves_its_range(recwarn: pytest.WarningsRecorder) -> None:
    for value in (1e-30, 1e30):
        assert float(get_total_norm(torch.full((90_000,), value))) == pytest.approx(300 * value, rel=1e-7)
    assert float(get_total_norm(torch.full((90_000,), math.inf))) == math.inf
    assert not recwarn.list


def test_where_the_rows_looked_at_say_nothing() -> None:
    tensor = torch.zeros(100_000)
    tensor[-1000:] = randn(1000)
    assert float(get_total_norm(tensor)) == pytest.approx(exact_norm(tensor.tolist()[-1000:]), rel=1e-7)


def test_storages_stay_resizable() -> None:
    tensor = randn(30_000)
    get_total_norm([tensor, tensor[:5].clone()])
    tensor.resize_(40_000)
    assert tensor.untyped_storage().resizable()
