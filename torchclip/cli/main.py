"""The command line: ``torchclip COMMAND``, also ``python -m torchclip COMMAND``.

A command is a line in ``COMMANDS`` and a module of this package with two functions:

    def add_arguments(parser: argparse.ArgumentParser) -> None    # declares its options
    def run(**options) -> int | None                              # gets them by name, returns the exit status

What ``run`` cannot work with, such as options that do not go together or a file that cannot be read, it
refuses by raising ``argparse.ArgumentError(None, message)`` or an ``OSError``.  The user then sees one line
on stderr, as for an option that argparse refuses, and the exit status is 2.  After Ctrl-C it is 130.

Only the module of the command that is called gets imported, so that ``torchclip info`` needs no extra.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torchclip

__all__ = ["COMMANDS", "file_to_write", "main", "png_file"]


class Command(NamedTuple):
    """What the overview of all commands has to know of each."""

    summary: str
    needs_demo: bool


COMMANDS = {
    "train": Command("Train a language model with and without clipping, and compare.", needs_demo=True),
    "book": Command("Run the book's chapter on exploding gradients as experiments.", needs_demo=True),
    "run": Command(
        "Run a training script with torchclip installed, then say what clipping did.", needs_demo=False
    ),
    "bench": Command(
        "Measure how fast and exact clipping is on this machine, beside torch and others.", needs_demo=True
    ),
    "info": Command("Show versions, threads, and what is available on this machine.", needs_demo=False),
}

DEMO_PACKAGES = ("rich", "matplotlib")


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line, without repeating the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2; of the processes that ``torchrun`` starts here, one speaks for all."""
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"
        self.exit(2, f"{self.prog}: error: {message}\n" if speaks else None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: what follows the program's name; by default that of this process.

    Returns:
        The exit status.

    Raises:
        SystemExit: after ``--help`` and ``--version``, and with code 2 for what a command refuses.
    """
    if arguments is None:
        arguments = sys.argv[1:]
    parser = Parser(
        prog="torchclip", description="Gradient clipping for PyTorch: the commands. Each has --help."
    )
    parser.add_argument("--version", action="version", version=f"torchclip {torchclip.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparsers.add_parser(name, help=command.summary, description=command.summary)

    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        parser.parse_args(arguments)
        parser.print_help()
        return 0
    return _run(name, subparsers.choices[name], arguments[1:])


def file_to_write(text: str) -> Path:
    """An option's value that is a file to write; refused now rather than after the work."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a directory")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written to")
    return path


def png_file(text: str) -> Path:
    """An option's value that is a PNG file to write."""
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, got {text}")
    return file_to_write(text)


def _run(name: str, parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    if COMMANDS[name].needs_demo:
        missing = [package for package in DEMO_PACKAGES if importlib.util.find_spec(package) is None]
        if missing:
            parser.error(f"needs {' and '.join(missing)}; install with: pip install 'torchclip[demo]'")
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # ASCII output gets "?" for "é", not an exception
    command = importlib.import_module(
        f"torchclip.cli.{name}" if name == "info" else f"torchclip.cli.{name}.{name}"
    )
    command.add_arguments(parser)
    options = vars(parser.parse_args(arguments))
    try:
        return command.run(**options) or 0
    except (argparse.ArgumentError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
