"""Checks that need a GPU: ``pytest -m gpu tests/gpu`` runs them, and prints the benchmark's table."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import grad_of, random_gradients, with_gradients
from torch import Tensor, nn

import torchclip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch calls cuda"),
]
INF = math.inf
REAL = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(), (3,), (0, 4), (64, 33), (1000, 257), (7, 5, 3)]
NORM_TYPES = [0.0, 0.5, 1.0, 2.0, 3.0, -1.0, INF]


def on_gpu(gradients: list[Tensor]) -> list[nn.Parameter]:
    parameters = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros_like(gradient, device="cuda"))
        parameter.grad = gradient.cuda()
        parameters.append(parameter)
    return parameters


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Raises an error if anything waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


class TestValues:
    @pytest.mark.parametrize("dtype", [*REAL, torch.complex64, torch.complex128])
    @pytest.mark.parametrize("order", NORM_TYPES)
    def test_are_those_of_host_memory(self, dtype: torch.dtype, order: float) -> None:
        gradients = random_gradients(SHAPES, dtype)
        host, device = with_gradients([g.clone() for g in gradients]), on_gpu(gradients)
        for call in (torchclip.clip_grad_norm_per_parameter_, torchclip.clip_grad_norm_):
            expected, found = call(host, 0.5, order), call(device, 0.5, order)
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-7, atol=0)
            for a, b in zip(device, host, strict=True):
                torch.testing.assert_close(grad_of(a).cpu(), grad_of(b))

    @pytest.mark.parametrize("dtype", REAL)
    def test_halves_are_rounded_once(self, dtype: torch.dtype) -> None:
        (gradient,) = random_gradients([(500, 70)], dtype)
        (parameter,) = on_gpu([gradient])
        total_norm = torchclip.clip_grad_norm_(parameter, 1.0).double().cpu()
        exact = gradient.double() * (1.0 / (gradient.double().norm() + 1e-6))
        eps = torch.finfo(dtype).eps
        assert total_norm == pytest.approx(float(gradient.double().norm()), rel=1e-7)
        torch.testing.assert_close(grad_of(parameter).double().cpu(), exact, rtol=eps / 2 + 2e-7, atol=1e-9)

    @pytest.mark.parametrize(
        ("gradients", "expected"),
        [
            ([torch.full((4,), 1e20)], 2e20),
            ([torch.full((90_000,), 300.0).half()], 90_000.0),
            ([torch.full((1 << 20,), 1e-3).bfloat16()], float(torch.tensor(1e-3).bfloat16()) * 1024),
            ([torch.full((4,), 1e200, dtype=torch.float64)], 2e200),
            ([torch.full((1 << 24,), 0.1)], float(torch.tensor(0.1)) * 4096),
        ],
    )
    def test_norms_that_a_narrower_sum_gets_wrong(self, gradients: list[Tensor], expected: float) -> None:
        found = torchclip.get_total_norm([g.cuda() for g in gradients])
        assert float(found) == pytest.approx(expected, rel=1e-7)

    def test_non_finite_elements_spread_as_in_torch(self) -> None:
        for value in (INF, math.nan):
            gradients = [torch.tensor([1.0, value]), torch.ones(3)]
            mine, others = on_gpu(gradients), on_gpu(gradients)
            torchclip.clip_grad_norm_(mine, 1.0)
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            for a, b in zip(mine, others, strict=True):
                torch.testing.assert_close(a.grad, b.grad, equal_nan=True)


CALLS: dict[str, Callable[[list[nn.Parameter]], object]] = {
    "clip_grad_norm_": lambda ps: torchclip.clip_grad_norm_(ps, 1.0),
    "clip_grad_norm_ of order 3": lambda ps: torchclip.clip_grad_norm_(ps, 1.0, 3.0),
    "get_total_norm": lambda ps: torchclip.get_total_norm([grad_of(p) for p in ps]),
    "clip_grads_with_norm_": lambda ps: torchclip.clip_grads_with_norm_(
        ps, 1.0, torch.full((), 9.0, device="cuda")
    ),
    "clip_grad_value_": lambda ps: torchclip.clip_grad_value_(ps, 0.5),
    "clip_grad_norm_per_parameter_": lambda ps: torchclip.clip_grad_norm_per_parameter_(ps, 1.0),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", REAL)
def test_nothing_waits(name: str, dtype: torch.dtype, no_waiting: None) -> None:
    with torch.no_grad():
        parameters = [nn.Parameter(torch.zeros(30, 20, dtype=dtype, device="cuda")) for _ in range(5)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.3)
    CALLS[name](parameters)


@pytest.mark.parametrize("options", [{}, {"scope": "parameter"}, {"nonfinite": "zero"}])
@pytest.mark.parametrize("fused", [True, False])
def test_a_clippers_step_does_not_wait(options: dict[str, Any], fused: bool) -> None:
    parameters = on_gpu(random_gradients([(30, 20)] * 5, torch.float32))
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=fused, foreach=not fused)
    clipper = torchclip.Clipper(optimizer, 1.0, **options)
    optimizer.step()  # makes the optimizer's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(clipper.history) == 4


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", REAL)
def test_a_cuda_graph_does_it_again(name: str, dtype: torch.dtype) -> None:
    gradients = random_gradients([(30, 20)] * 5, dtype)
    parameters, others = on_gpu(gradients), on_gpu(gradients)
    held = [grad_of(p) for p in parameters]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        CALLS[name](parameters)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        CALLS[name](parameters)
    for tensor, gradient in zip(held, gradients, strict=True):
        tensor.copy_(gradient)
    graph.replay()
    CALLS[name](others)
    for tensor, other in zip(held, others, strict=True):
        torch.testing.assert_close(
            tensor, grad_of(other), rtol=1e-6 if dtype in REAL[::3] else 2e-2, atol=1e-6
        )


@pytest.mark.parametrize("dtype", REAL)
def test_no_copy_of_the_gradients_is_made(dtype: torch.dtype) -> None:
    parameters = on_gpu([torch.ones(1 << 22, dtype=dtype) for _ in range(32)])
    size = sum(grad_of(p).nbytes for p in parameters)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torchclip.clip_grad_norm_(parameters, 1.0)
    torchclip.clip_grad_value_(parameters, 0.5)
    assert torch.cuda.max_memory_allocated() - before < size / 4


def test_the_table(capfd: pytest.CaptureFixture[str]) -> None:
    """Prints ``torchclip bench --device cuda``."""
    command = [sys.executable, "-m", "torchclip", "bench", "--device", "cuda"]
    with capfd.disabled():
        subprocess.run(command, check=True)
