"""The command ``torchclip run``: a training script as it is, with torchclip installed.

At its end the command prints on stderr what clipping did and cost.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

from torchclip import patch
from torchclip.cli.options import refusal
from torchclip.cli.run.recorder import Recorder
from torchclip.cli.run.report import report
from torchclip.cli.run.script import prepare, traceback_of_script

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Register the options."""
    parser.usage = "%(prog)s [-h] [-m] SCRIPT [ARGUMENT ...]"
    parser.add_argument(
        "-m", dest="module", action="store_true", help="SCRIPT is a module's name, as in python -m"
    )
    parser.add_argument("script", metavar="SCRIPT", help="the training script, or with -m the module")
    rest = parser.add_argument(
        "args", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="an argument of the script's own"
    )
    rest.required = False  # or, until Python 3.12, the error for a missing SCRIPT asks for it, too


def run(script: str, args: list[str], module: bool = False) -> int:
    """Run a script, or a module, as Python would; then report.

    The script becomes this process's ``__main__`` and stays it.

    Args:
        script: the script's path, or the module's name.
        args: the script's arguments.
        module: whether ``script`` names a module.

    Returns:
        The exit status.

    Raises:
        argparse.ArgumentError: if there is no such script.
        SystemExit: the script's.
    """
    try:
        main = prepare(script, args, module)
    except SyntaxError as error:
        sys.excepthook(type(error), error.with_traceback(None), None)
        return 1
    process = os.getpid()
    patch.install()
    recorder = Recorder()
    recorder.attach()
    start = time.perf_counter()
    began = True
    try:
        status, began = _status(main)
        return status
    except argparse.ArgumentError:
        began = False
        raise
    finally:
        # A forked child that gets here has nothing to report, and of many ranks one is enough.
        if began and os.getpid() == process and os.environ.get("RANK", "0") == "0":
            if sys.stdout is not None:
                sys.stdout.flush()
            print(report(recorder, time.perf_counter() - start), file=sys.stderr)


def _status(main: Callable[[], object]) -> tuple[int, bool]:
    """Call the script, and say what went wrong as Python would: the exit status, and whether it began."""
    try:
        main()
    except SystemExit:
        raise
    except BaseException as error:
        error.__traceback__ = traceback_of_script(error.__traceback__)
        if error.__traceback__ is None and isinstance(error, ImportError):
            raise refusal(f"argument SCRIPT: {error}") from None
        sys.excepthook(type(error), error, error.__traceback__)
        return 130 if isinstance(error, KeyboardInterrupt) else 1, error.__traceback__ is not None
    return 0, True
