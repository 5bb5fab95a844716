"""The compiled CPU kernel: whether it is active, and how to turn it off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torchclip._core import native

__all__ = ["disabled", "status"]


def status() -> str:
    """One line on whether the kernel is active, and why not if it is not."""
    return native.status()


@contextmanager
def disabled() -> Iterator[None]:
    """Everything through torch operations, to compare the kernel with.

    In all threads, until each of them has left the last such block that it is in.
    """
    if native.extension is None:
        yield
        return
    native.extension.disable()
    try:
        yield
    finally:
        native.extension.enable()
