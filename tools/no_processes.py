"""A plugin for pytest: skips the tests that start processes, which an emulated Python cannot."""

import multiprocessing.process
import subprocess

import pytest


def _refuse(*_: object, **__: object) -> None:
    pytest.skip("starts a process")


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the test at the process that it starts."""
    monkeypatch.setattr(subprocess.Popen, "__init__", _refuse)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", _refuse)
