"""A plugin for pytest on an emulated machine: skips tests that start processes, which it cannot.

With ``ONE_IN=8`` in the environment, it runs one test in eight.
"""

import multiprocessing.process
import os
import subprocess

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("emulated", deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("emulated")


def _refuse(*_: object, **__: object) -> None:
    pytest.skip("starts a process")


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the test at the process that it starts."""
    monkeypatch.setattr(subprocess.Popen, "__init__", _refuse)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", _refuse)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep one test in `ONE_IN`."""
    items[:] = items[:: int(os.environ.get("ONE_IN", "1"))]
