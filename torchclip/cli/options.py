"""The kinds of values that options take: each reads a text, and refuses what cannot be used.

A kind is a function for the ``type`` of an option.  What it raises names the value; ``argparse`` puts the
option's name before it.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "count",
    "directory_to_write",
    "file_to_read",
    "file_to_write",
    "max_norm",
    "picture_file",
    "positive",
    "refusal",
    "seed",
    "writing",
]

_PICTURES = (".png", ".svg", ".pdf")


def refusal(message: str) -> argparse.ArgumentError:
    """What a command raises for options that it cannot work with; the message says which and why."""
    return argparse.ArgumentError(None, message)


# Numbers


def max_norm(text: str) -> float:
    """An option's value that is a threshold, as the functions take it: at least 0, ``inf`` not to clip."""
    return _number(text, lambda value: value >= 0, "a number that is at least 0")


def positive(text: str) -> float:
    """An option's value that is a finite number above 0."""
    return _number(text, lambda value: 0 < value < math.inf, "a finite number above 0")


def _number(text: str, holds: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not holds(value):  # no comparison holds for nan
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
    return value


def count(text: str) -> int:
    """An option's value that is a whole number above 0."""
    return _whole(text, least=1, end=None, what="a whole number above 0")


def seed(text: str) -> int:
    """An option's value that torch takes as a seed."""
    return _whole(text, least=0, end=2**63, what="a whole number from 0 to 2**63 - 1")


def _whole(text: str, least: int, end: int | None, what: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (end is not None and value >= end):
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
    return value


# Files; what cannot be used is refused now rather than after the work


def file_to_read(text: str) -> Path:
    """An option's value that is a file to read."""
    path = Path(text)
    with _looking_at(path):
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{path} is a directory")
        if not path.exists():
            raise argparse.ArgumentTypeError(f"No such file: {path}")
        if not os.access(path, os.R_OK):
            raise argparse.ArgumentTypeError(f"{path} cannot be read")
    return path


def file_to_write(text: str) -> Path:
    """An option's value that is a file to write."""
    path = Path(text)
    with _looking_at(path):
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{path} is a directory")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"there is no directory {path.parent}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"{path} cannot be written to")
    return path


def picture_file(text: str) -> Path:
    """An option's value that is a picture to write, of a kind that its name's ending says."""
    if Path(text).suffix.lower() not in _PICTURES:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(_PICTURES)}, got {text!r}")
    return file_to_write(text)


def directory_to_write(text: str) -> Path:
    """An option's value that is a directory for files; it and those above it may have to be made."""
    path = Path(text)
    with _looking_at(path):
        there = next(place for place in (path, *path.absolute().parents) if place.exists())
        if not there.is_dir():
            raise argparse.ArgumentTypeError(f"{there} is not a directory")
        if not os.access(there, os.W_OK):
            raise argparse.ArgumentTypeError(f"{there} cannot be written to")
    return path


@contextmanager
def _looking_at(path: Path) -> Iterator[None]:
    """Refuse a path that cannot even be looked at: its name is too long, or a directory is closed."""
    try:
        yield
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{error.strerror}: {path}") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Have errors of writing to a file name it: a full disk's do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise
