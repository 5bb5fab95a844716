"""Tensors on a device: how many operations they take, and that no value is read on the way.

Operations are counted on ``meta`` tensors, where reading a value raises.  Values are checked on tensors
in host memory, which the batch takes as well, here and in the contract's tests (``kernel_on_and_off``).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import Operations, as_on_an_accelerator, randn, with_gradients
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn.utils import clip_grad as torchs
from torch.optim import optimizer as optimizers

import torchclip
from torchclip._core import groups, memory, rows
from torchclip._core.batch import Facts
from torchclip._core.operations import TorchBatch
from torchclip.clipper import Nonfinite, Scope
from torchclip.thresholds import MaxNorm

INF, NAN = math.inf, math.nan
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
ORDERS = (1.0, 2.0, INF)
OTHER_ORDERS = (0.0, 0.5, 3.0, -1.0, -INF)


def operations(call: Callable[..., object], *args: Any) -> list[str]:
    mode = Operations()
    with mode:
        call(*args)
    return mode.names


def on_meta(count: int, *dtypes: torch.dtype) -> list[nn.Parameter]:
    """Parameters whose gradients have these dtypes in turn."""
    parameters = []
    for i in range(count):
        dtype = dtypes[i % len(dtypes)]
        parameter = nn.Parameter(torch.zeros(3, i % 5 + 1, dtype=dtype, device="meta"))
        parameter.grad = torch.zeros_like(parameter)
        parameters.append(parameter)
    return parameters


@pytest.fixture(autouse=True)
def not_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors in host memory, whose values can be compared, are changed as those on a device are."""
    as_on_an_accelerator(monkeypatch)


def gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


# Each with the orders to call it with, and how many operations it may take.
CALLS: dict[str, tuple[Callable[[list[nn.Parameter], float], object], tuple[float, ...], int]] = {
    "clip_grad_norm_": (lambda ps, order: torchclip.clip_grad_norm_(ps, 1.0, order), ORDERS, 19),
    "of another order": (lambda ps, p: torchclip.clip_grad_norm_(ps, 1.0, p), OTHER_ORDERS, 30),
    "get_total_norm": (lambda ps, order: torchclip.get_total_norm(gradients(ps), order), ORDERS, 13),
    "clip_grads_with_norm_": (
        lambda ps, _: torchclip.clip_grads_with_norm_(ps, 1.0, torch.ones((), device="meta")),
        (2.0,),
        12,
    ),
    "clip_grad_value_": (lambda ps, _: torchclip.clip_grad_value_(ps, 1.0), (2.0,), 6),
    "clip_grad_norm_per_parameter_": (
        lambda ps, order: torchclip.clip_grad_norm_per_parameter_(ps, 1.0, order),
        ORDERS,
        24,
    ),
    "clip_grad_rms_": (lambda ps, _: torchclip.clip_grad_rms_(ps, 1.0), (2.0,), 24),
}


# Torch has no operation on lists of tensors for norms of rows: how many a further tensor takes.
CALLS_BY_ROWS: dict[str, tuple[Callable[[list[nn.Parameter]], object], int]] = {
    "clip_grad_adaptive_": (torchclip.clip_grad_adaptive_, 4),
    "clip_per_example": (lambda ps: torchclip.clip_per_example(gradients(ps), 1.0), 6),
}


class TestOperations:
    @pytest.mark.parametrize("dtype", [F32, F16, BF16])
    @pytest.mark.parametrize("name", CALLS_BY_ROWS)
    def test_a_few_for_each_tensor_where_there_are_none_on_lists(self, name: str, dtype: torch.dtype) -> None:
        call, most = CALLS_BY_ROWS[name]
        few, many = (len(operations(call, on_meta(count, dtype))) for count in (10, 100))
        assert many - few <= 90 * most
        assert few <= 10 * most + 30

    @pytest.mark.parametrize("dtypes", [(F32,), (F16,), (BF16,), (F64,), (F32, BF16)])
    @pytest.mark.parametrize("name", CALLS)
    def test_their_number_is_small_and_does_not_grow(
        self, name: str, dtypes: tuple[torch.dtype, ...]
    ) -> None:
        call, orders, most = CALLS[name]
        few, many = on_meta(10, *dtypes), on_meta(100, *dtypes)
        for order in orders:
            count = len(operations(call, few, order))
            assert count == len(operations(call, many, order)) <= most + 10 * (len(dtypes) - 1)

    @pytest.mark.parametrize("dtype", [F32, F16])
    def test_no_more_than_torchs(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        # Torch asks by name whether a device has operations on lists, and "meta" is not in its list.
        monkeypatch.setattr(torchs, "_has_foreach_support", lambda tensors, device: True)
        monkeypatch.setattr(torchs, "_device_has_foreach_support", lambda device: True)

        def launched(call: Callable[[], object]) -> int:
            """Counts operations as a profiler does, also those that change nothing."""
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                call()
            views = {"aten::view", "aten::unbind", "aten::split", "aten::detach"}
            events = [e for e in profile.events() or [] if e.cpu_parent is None]
            return len([e for e in events if e.name.startswith("aten::") and e.name not in views])

        ours, others = on_meta(160, dtype), on_meta(160, dtype)
        assert launched(lambda: torchclip.clip_grad_norm_(ours, 1.0)) <= 16
        assert launched(lambda: torchs.clip_grad_norm_(others, 1.0)) > 160


class TestTwoDevices:
    """Fake tensors know which device they are on, and refuse to be mixed."""

    @pytest.mark.parametrize("order", [2.0, 3.0])
    def test_each_gets_what_it_needs_on_its_own(self, order: float, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "PLAIN", (*memory.PLAIN, FakeTensor))
        with FakeTensorMode():
            tensors = [
                torch.empty(3, 2, dtype=dtype, device=device)
                for dtype in (F32, F16, BF16, F64)
                for device in ("cuda:1", "cuda:0")
            ]
            parameters = with_gradients([None] * len(tensors), [torch.empty_like(t) for t in tensors])
            for parameter, tensor in zip(parameters, tensors, strict=True):
                parameter.grad = tensor
            total = torchclip.clip_grad_norm_(parameters, 1.0, order)
            norms = torchclip.clip_grad_norm_per_parameter_(parameters, 1.0, order)
            torchclip.clip_grad_value_(parameters, 1.0)
        assert (total.device, norms.device) == (tensors[0].device, tensors[0].device)
        assert (total.shape, norms.shape) == ((), (len(tensors),))


def batch_of(*tensors: Tensor) -> TorchBatch:
    return TorchBatch(list(tensors))


class TestNorms:
    @pytest.mark.parametrize("order", [1.0, 2.0, 3.0, INF])
    def test_copies_in_parts_make_no_difference(self, order: float, monkeypatch: pytest.MonkeyPatch) -> None:
        tensors = [randn(7, i + 1, dtype=F64, seed=i) for i in range(6)]
        batch = batch_of(*tensors)
        total, norms = float(batch.norm(order)), batch.norms(order)
        monkeypatch.setattr(groups, "_COPIED", 20)
        assert float(batch.norm(order)) == pytest.approx(total, rel=1e-14)
        assert torch.equal(torch.as_tensor(batch.norms(order)), torch.as_tensor(norms))

    def test_norms_of_no_elements_are_on_the_device(self) -> None:
        with torch.device("meta"):
            (parameter,) = with_gradients([torch.zeros(0)])
        assert torchclip.clip_grad_norm_per_parameter_([parameter], 1.0).is_meta

    def test_without_float64_it_is_float32_and_still_in_range(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (groups, rows):  # as on mps
            monkeypatch.setattr(module, "norm_dtype", lambda device: F32)
        for scale in (1e-30, 1.0, 1e30):
            tensors = [torch.full((2, 2), scale), torch.full((5,), scale)]
            assert float(batch_of(*tensors).norm(2.0)) == pytest.approx(3 * scale, rel=1e-6)
            assert float(batch_of(*tensors).norm(3.0)) == pytest.approx(9 ** (1 / 3) * scale, rel=1e-6)


class TestScaling:
    @pytest.mark.parametrize("dtype", [F16, BF16])
    @pytest.mark.parametrize("unscaling", [["cpu"], []])  # as on CUDA, for float16, and as elsewhere
    def test_half_types_are_rounded_once(
        self, dtype: torch.dtype, unscaling: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(groups, "_UNSCALING", frozenset(unscaling))
        tensors = [randn(40, 3, dtype=dtype), *(torch.tensor(v).to(dtype) for v in (1.7, [INF, NAN, 1.0]))]
        clip_coef = torch.tensor(0.3337, dtype=F64)
        expected = [(t.double() * clip_coef.float().double()).to(dtype) for t in tensors]
        versions = [t._version for t in tensors]
        batch_of(*tensors).scale_(clip_coef)
        for tensor, value, version in zip(tensors, expected, versions, strict=True):
            torch.testing.assert_close(tensor, value, rtol=0, atol=0, equal_nan=True)
            assert tensor._version > version

    @pytest.mark.parametrize("copied", [4, 1 << 24])
    def test_non_finite_elements_become_0(self, copied: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(groups, "_COPIED", copied)
        values = [[INF, 1.0], [NAN], [-INF, 2.0, -3.0], [5.0] * 6]
        tensors = [torch.tensor(v).to(dtype) for dtype in (F32, F16, torch.complex64) for v in values]
        expected = [torch.where(tensor.isfinite(), tensor, 0) for tensor in tensors]
        versions = [tensor._version for tensor in tensors]
        batch_of(*tensors).zero_nonfinite_()
        for tensor, value, version in zip(tensors, expected, versions, strict=True):
            assert torch.equal(tensor, value)
            assert tensor._version > version


def test_facts() -> None:
    gaps = torch.zeros(4, 6)[:, ::2]
    assert batch_of(torch.zeros(2), torch.zeros(2, 3).t()).facts == 0
    double = torch.zeros(2, dtype=torch.complex128)
    assert batch_of(double, gaps).facts == Facts.DOUBLE | Facts.COMPLEX | Facts.GAPS
    assert TorchBatch([torch.zeros(2)], shared=True).facts == Facts.SHARED_GRADIENT


def fused_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets fused optimizers take meta tensors; torch asks by name whether a device has kernels for them."""
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["meta"])


def one_group(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def two_groups(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    halves = [{"params": parameters[i::2]} for i in range(2)]
    return torch.optim.SGD(halves, lr=0.1)


def fused(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, fused=True)


class TestClipper:
    @pytest.mark.parametrize(
        ("optimizer_of", "scope", "nonfinite", "dtypes", "most"),
        [
            (one_group, "global", "propagate", (F32,), 20),
            (one_group, "global", "propagate", (BF16,), 20),
            (fused, "global", "propagate", (F32,), 16),
            (fused, "global", "propagate", (F16,), 16),
            (fused, "global", "propagate", (BF16,), 16),
            (fused, "global", "propagate", (F32, BF16), 16),
            (one_group, "parameter", "propagate", (F32,), 32),
            (two_groups, "group", "propagate", (F32,), 2 * 24),
            *((one_group, scope, "zero", (F32,), 50) for scope in ("global", "parameter")),
            *((one_group, scope, "zero", (F64,), 59) for scope in ("global", "parameter")),
            *((one_group, scope, "zero", (F32, BF16), 69) for scope in ("global", "parameter")),
        ],
    )
    def test_a_step_takes_a_few_more_operations(
        self,
        optimizer_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        scope: Scope,
        nonfinite: Nonfinite,
        dtypes: tuple[torch.dtype, ...],
        most: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        fused_on_meta(monkeypatch)
        added = []
        for count in (10, 100):
            optimizer = optimizer_of(on_meta(count, *dtypes))
            optimizer.step()
            alone = len(operations(optimizer.step))
            torchclip.Clipper(optimizer, 1.0, scope=scope, nonfinite=nonfinite)
            added.append(len(operations(optimizer.step)) - alone)
        assert added[0] == added[1] <= most

    @pytest.mark.parametrize("scope", ["global", "parameter"])
    @pytest.mark.parametrize(
        "threshold",
        [
            torchclip.ZScore(warmup=3),
            torchclip.AdaGC(warmup=3),
            torchclip.RollingSigma(warmup=2, window=3),
            torchclip.Percentile(10, warmup=2, window=3),
            lambda step: 1.0 + step,
        ],
    )
    def test_thresholds_that_change_read_no_value(self, threshold: MaxNorm, scope: Scope) -> None:
        added = []
        for parameters, steps in ((3, 8), (40, 2)):
            optimizer = one_group(on_meta(parameters, F32))
            alone = len(operations(optimizer.step))
            torchclip.Clipper(optimizer, threshold, scope=scope)
            optimizer.step()
            # With few parameters, until after the warm-up and twice around the window.
            counted = [operations(optimizer.step) for _ in range(steps)]
            assert counted == [counted[0]] * steps
            added.append(len(counted[0]) - alone)
        assert added[0] == added[1]
