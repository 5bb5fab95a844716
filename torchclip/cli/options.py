"""The types of options: each converts a text, or refuses it.

A type is a function for the ``type`` of an argparse option.  Its error names the value, and argparse puts the
name of the option before it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from torchclip._core.extras import check_installed

__all__ = [
    "count",
    "file_to_write",
    "max_norm",
    "need",
    "picture_file",
    "refusal",
    "writing",
]

Number = TypeVar("Number", int, float)


def refusal(message: str) -> argparse.ArgumentError:
    """The error for options that a command cannot use; the message says which, and why."""
    return argparse.ArgumentError(None, message)


def need(option: str, *packages: str) -> None:
    """Refuse an option if packages that it needs are not installed.

    Raises:
        argparse.ArgumentError: with how to install them.
    """
    try:
        check_installed(option, *packages)
    except ModuleNotFoundError as error:
        raise refusal(str(error)) from None


# Numbers


def _number(
    kind: Callable[[str], Number], holds: Callable[[Number], bool], what: str
) -> Callable[[str], Number]:
    def number(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):  # comparisons with nan are false
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
        return value

    return number


max_norm = _number(float, lambda value: value >= 0, "a number that is at least 0")  # inf for no clipping
count = _number(int, lambda value: value > 0, "a whole number above 0")


# Files; they are checked before the work begins


def _path(problem: Callable[[Path], str]) -> Callable[[str], Path]:
    """An option's type for paths, from a function that says what is wrong with a path, or ""."""

    def path(text: str) -> Path:
        path = Path(text)
        try:
            message = problem(path)
        except OSError as error:  # a path that the system cannot look up, such as one with too long a name
            message = f"{error.strerror}: {path}"
        if message:
            raise argparse.ArgumentTypeError(message)
        return path

    return path


@_path
def file_to_write(path: Path) -> str:
    """A file to write."""
    if path.is_dir():
        return f"{path} is a directory"
    if not path.parent.is_dir():
        return f"there is no directory {path.parent}"
    there = path if path.exists() else path.parent
    return "" if os.access(there, os.W_OK) else f"{path} cannot be written to"


def picture_file(text: str) -> Path:
    """A picture to write, in the format of the file's ending."""
    if Path(text).suffix.lower() not in {".png", ".svg", ".pdf"}:
        raise argparse.ArgumentTypeError(f"must end in .png, .svg or .pdf, got {text!r}")
    return file_to_write(text)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Add the file's name to errors of writing it; the error for a full disk has none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise
