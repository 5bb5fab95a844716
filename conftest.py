"""Adds the documentation's code to the tests; all tests run alike, wherever they are started."""

import os
from collections.abc import Iterator

import pytest

# Tests share the cores with the programs that they start; with little work, threads only wait for each other.
# A test of threads sets their number; while waiting, these leave the core to others. OpenMP reads this once,
# when torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"

from documentation import as_a_reader, pytest_collect_file

__all__ = ["as_a_reader", "pytest_collect_file"]

_OF_TERMINALS = ["FORCE_COLOR", "NO_COLOR", "PYTHON_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"]
_OF_LAUNCHERS = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"]


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Output has 80 columns and no colors, and no launcher says that there are other processes."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _OF_TERMINALS + _OF_LAUNCHERS:
            patch.delenv(name, raising=False)
        patch.setenv("COLUMNS", "80")
        yield
