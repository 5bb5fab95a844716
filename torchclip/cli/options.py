"""The types of options: each converts a text, or refuses it.

A type is a function for the ``type`` of an argparse option.  Its error names the value, and argparse puts the
name of the option before it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["count", "file_to_write", "max_norm", "picture_file", "refusal"]

Number = TypeVar("Number", int, float)


def refusal(message: str) -> argparse.ArgumentError:
    """The error for options that a command cannot use; the message says which, and why."""
    return argparse.ArgumentError(None, message)


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


def file_to_write(text: str) -> Path:
    """A file to write."""
    path = Path(text)
    if path.suffix == ".py":  # a script, before which FILE was forgotten
        raise argparse.ArgumentTypeError(f"must not be a Python file, got {text!r}")
    if os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{path} is a directory")
    if not os.path.isdir(path.parent):
        raise argparse.ArgumentTypeError(f"there is no directory {path.parent}")
    try:
        there = path if path.exists() else path.parent
    except OSError as error:  # a path that the system cannot look up, such as one with too long a name
        raise argparse.ArgumentTypeError(f"{error.strerror}: {path}") from None
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written to")
    return path


def picture_file(text: str) -> Path:
    """A picture to write, in the format of the file's ending."""
    if Path(text).suffix.lower() not in {".png", ".svg", ".pdf"}:
        raise argparse.ArgumentTypeError(f"must end in .png, .svg or .pdf, got {text!r}")
    return file_to_write(text)
