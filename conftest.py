"""The code of the documentation is among the tests, and all tests run with one thread of torch."""

import os

# Tests share the cores with the programs that they start; where all is small, threads only wait for
# one another.  A test of threads sets their number, and these leave the core to others while they wait.
# OpenMP reads this once, when torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"

from documentation import as_a_reader, pytest_collect_file

__all__ = ["as_a_reader", "pytest_collect_file"]
