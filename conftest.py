"""Adds the documentation's code to the tests; all tests run with one thread of torch."""

import os

# Tests share the cores with the programs that they start; with little work, threads only wait for each other.
# A test of threads sets their number; while waiting, these leave the core to others. OpenMP reads this once,
# when torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"

from documentation import as_a_reader, pytest_collect_file

__all__ = ["as_a_reader", "pytest_collect_file"]
