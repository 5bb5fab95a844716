"""The types of options: each converts a text, and refuses a text that it cannot use.

A type is a function for the ``type`` of an argparse option.  Its error names the value, and argparse puts the
name of the option before it.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torchclip._core.extras import installing

__all__ = [
    "count",
    "directory_to_write",
    "file_to_read",
    "file_to_write",
    "max_norm",
    "need",
    "picture_file",
    "positive",
    "refusal",
    "seed",
    "writing",
]

_PICTURES = (".png", ".svg", ".pdf")


def refusal(message: str) -> argparse.ArgumentError:
    """The error of a command for options that it cannot use; the message says which, and why."""
    return argparse.ArgumentError(None, message)


def need(option: str, *packages: str) -> None:
    """Refuse an option if packages that it needs are not installed.

    Raises:
        argparse.ArgumentError: with how to install them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise refusal(f"{option} needs {' and '.join(missing)}; install with: {installing('demo')}")


# Numbers


def max_norm(text: str) -> float:
    """An option's value that is a threshold: at least 0, ``inf`` for no clipping."""
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


# Files; they are checked now, before the work


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
    """An option's value that is a picture to write, in the format of the file's ending."""
    if Path(text).suffix.lower() not in _PICTURES:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(_PICTURES)}, got {text!r}")
    return file_to_write(text)


def directory_to_write(text: str) -> Path:
    """An option's value that is a directory for files; it may not exist yet."""
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
    """Refuse a path that the system does not let us look up, such as one with too long a name."""
    try:
        yield
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{error.strerror}: {path}") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Add the file's name to errors of writing to it; the error of a full disk has none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise
