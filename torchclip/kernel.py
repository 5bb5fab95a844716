"""The compiled CPU kernel: whether it is active, and how to turn it off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torchclip._core import native

__all__ = ["disabled", "status"]


def status() -> str:
    """One line that says whether the kernel is active, and if not, why not."""
    return native.status()


@contextmanager
def disabled() -> Iterator[None]:
    """Use torch operations instead of the kernel within a ``with`` block, for comparison.

    This turns the kernel off in all threads, until the last open block has ended.
    """
    if native.extension is None:
        yield
        return
    native.extension.disable()
    try:
        yield
    finally:
        native.extension.enable()
