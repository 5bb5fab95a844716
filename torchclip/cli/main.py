"""The command line: ``torchclip COMMAND``, also ``python -m torchclip COMMAND``.

A command is a line in ``COMMANDS`` and a module with two functions, ``torchclip.cli.NAME`` or
``torchclip.cli.NAME.command``:

    def add_arguments(parser: argparse.ArgumentParser) -> None    # declares its options
    def run(options: argparse.Namespace) -> int | None            # gets them, returns the exit status

If ``run`` cannot use its options, because they exclude each other or a file cannot be read, it raises
``options.refusal(message)`` or an ``OSError``.  The user then sees one line on stderr, as for an option that
argparse refuses, and the exit status is 2.  After Ctrl-C the status is 130.

Only the module of the called command is imported, so that ``torchclip info`` needs no extra.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import torchclip

__all__ = ["COMMANDS", "main"]


COMMANDS = {
    "run": "Run a training script, then report how many steps were clipped, and which threshold to use.",
    "bench": "Measure how long clipping takes on this machine, with torch and with torchclip.",
    "info": "Show versions, threads, and what is available on this machine.",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        if message.startswith("unrecognized arguments"):
            message += f"; see {self.prog} --help"
        self.exit(2, f"{self.prog}: error: {message}\n" if _prints() else None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the arguments after the program's name; by default those of this process.

    Returns:
        The exit status.

    Raises:
        SystemExit: after ``--help`` and ``--version``, and with code 2 if the command refuses its options.
    """
    if arguments is None:
        arguments = sys.argv[1:]
    parser = Parser(prog="torchclip", description="Gradient clipping for PyTorch. Each command has --help.")
    parser.add_argument("--version", action="version", version=f"torchclip {torchclip.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        subparsers.add_parser(name, help=summary, description=summary)

    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        parser.parse_args(arguments)
        parser.print_help()
        return 0
    return _run(name, subparsers.choices[name], arguments[1:])


def _run(name: str, parser: Parser, arguments: Sequence[str]) -> int:
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # ASCII output gets "?" for "é", not an exception
        module = f"{name}.command" if name == "run" else name
        command = importlib.import_module(f"torchclip.cli.{module}")
        command.add_arguments(parser)
        status: int = command.run(parser.parse_args(arguments)) or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (argparse.ArgumentError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        if _prints():
            print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130


def _prints() -> bool:
    """Whether this process prints: of those that ``torchrun`` starts on a machine, the first."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
