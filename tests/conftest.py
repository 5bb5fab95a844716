"""Fixtures that all test modules share, and how a session runs: in parallel."""

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helpers import Ranks
from helpers import as_on_an_accelerator
from hypothesis import HealthCheck, settings

from torchclip import kernel
from torchclip.clipper import fused

_ACTIVE = kernel.status().startswith("active")
_MOST_WORKERS = 8
_BOTH_WAYS = {"kernel_on_and_off", "everywhere", "each_way"}

# The same examples in each run, however slow the machine is, and whatever earlier runs have found.
_CHECKS = [HealthCheck.too_slow, HealthCheck.differing_executors, HealthCheck.function_scoped_fixture]
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=_CHECKS)
settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist then does what it does for `-n`
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Runs folders on all cores, and single files in this process, without workers to wait for.

    ``-n`` on the command line decides otherwise; ``-p no:xdist`` and ``--pdb`` keep all in one process.
    """
    option = config.option
    if not config.pluginmanager.has_plugin("xdist") or hasattr(config, "workerinput"):
        return
    folders = any(Path(argument).is_dir() for argument in config.args)
    if option.numprocesses is None and folders and not option.usepdb and not option.collectonly:
        option.numprocesses = min(os.cpu_count() or 1, _MOST_WORKERS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives a test function to any free worker, and all checks on ranks to one, as they share processes."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            if "on_ranks" in nodeid:
                return "on_ranks"
            if "test_examples.py" in nodeid:  # each runs for seconds, in a process of its own
                return nodeid
            return nodeid.partition("::" if ".md::" in nodeid else "[")[0]

        def _assign_work_unit(self, node: Any) -> None:
            if "on_ranks" in self.workqueue:  # the longest of all comes first
                self.workqueue.move_to_end("on_ranks", last=False)
            super()._assign_work_unit(node)

    return Scheduling(config, log) if config.option.dist == "load" else None


@pytest.hookimpl(tryfirst=True)  # before ``-m`` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests that run with and without the kernel in any case."""
    for item in items:
        if _BOTH_WAYS & set(getattr(item, "fixturenames", ())):
            item.add_marker("both_ways")


def pytest_collection_finish() -> None:
    """Hides the imported objects from the garbage collector: a million, which live as long as the session.

    Otherwise each collection, in tests and in each training of a framework, takes half a second.
    """
    gc.freeze()


def pytest_report_header() -> str:
    return f"torchclip kernel: {kernel.status()}"


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Restores the number of threads after a test, and fails one that leaves another setting changed.

    Otherwise a later test in the same process could fail, or pass, in some orders only.
    """
    threads, before = torch.get_num_threads(), _settings()
    yield
    torch.set_num_threads(threads)
    assert _settings() == before


def _settings() -> dict[str, object]:
    return {
        "torch": (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()),
        "installed": torch.nn.utils.clip_grad_norm_,
        "kernel": kernel.status(),
        "garbage collection": (gc.isenabled(), gc.get_threshold()),
        "process": ([*sys.argv], os.getcwd(), *map(signal.getsignal, (signal.SIGINT, signal.SIGTERM))),
    }


_WAYS = ["kernel", "torch operations"] if _ACTIVE else ["torch operations"]


@pytest.fixture(params=_WAYS)
def kernel_on_and_off(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test twice: with the compiled kernel, if there is one, and without."""
    with _way(request.param):
        yield request.param


@pytest.fixture(params=[*_WAYS, "accelerator"])
def everywhere(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test a third time as for tensors on an accelerator, though they are in host memory."""
    with _way(request.param):
        yield request.param


@pytest.fixture(params=_WAYS)
def each_way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test with the kernel and without.

    Fused steps multiply the gradients even where they are so small that it does not pay.
    """
    with _way_of_steps(request.param):
        yield request.param


@pytest.fixture(params=[*_WAYS, "accelerator"])
def each_way_everywhere(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same, and also as for tensors on an accelerator, although they are in host memory."""
    with _way_of_steps(request.param):
        yield request.param


@contextmanager
def _way_of_steps(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, _way(name):
        patch.setattr(fused, "_TOO_SMALL", 0)
        yield


@pytest.fixture
def on_host(everywhere: str) -> None:
    """For tests of promises for host memory only."""
    if everywhere == "accelerator":
        pytest.skip("not promised on an accelerator")


@contextmanager
def _way(name: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if name != "kernel":
            stack.enter_context(kernel.disabled())
        if name == "accelerator":
            as_on_an_accelerator(stack.enter_context(pytest.MonkeyPatch.context()))
        yield


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Processes that run checks together, for the whole session."""
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


@pytest.fixture
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has fused steps multiply the gradients even where they are so small that it does not pay."""
    monkeypatch.setattr(fused, "_TOO_SMALL", 0)
