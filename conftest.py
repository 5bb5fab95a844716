"""The code of the documentation is among the tests."""

from documentation import as_a_reader, pytest_collect_file

__all__ = ["as_a_reader", "pytest_collect_file"]
