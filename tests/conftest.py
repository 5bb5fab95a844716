"""Fixtures that all test modules share."""

from collections.abc import Iterator

import pytest
import torch

from torchclip import kernel
from torchclip.clipper import clipper

_ACTIVE = kernel.status().startswith("active")


def pytest_report_header() -> str:
    return f"torchclip kernel: {kernel.status()}"


@pytest.fixture(scope="module", params=["kernel", "torch operations"] if _ACTIVE else ["torch operations"])
def kernel_on_and_off(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a module's tests twice: with the compiled kernel, if there is one, and without."""
    if request.param == "kernel":
        yield request.param
    else:
        with kernel.disabled():
            yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads: None) -> None:
    """Where all is small, threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has fused steps multiply the gradients even where they are so small that it does not pay."""
    monkeypatch.setattr(clipper, "_SMALL", -1)
