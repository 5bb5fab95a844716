"""Runs a script or a module in this process, as Python itself would."""

from __future__ import annotations

import io
import os
import runpy
import sys
import types
from collections.abc import Callable
from functools import partial

from torchclip.cli.options import refusal


def prepare(script: str, args: list[str], module: bool) -> Callable[[], object]:
    """Set up this process for the script as Python would, and compile it.

    Args:
        script: the script's path, or the module's name.
        args: the script's arguments.
        module: whether ``script`` names a module.

    Returns:
        A function that runs the script.

    Raises:
        argparse.ArgumentError: if there is nothing to run.
        SyntaxError: if the script is not valid Python.
    """
    sys.argv[:] = [script, *args]
    if module:
        _import_from(os.getcwd())
        return partial(runpy.run_module, script, run_name="__main__", alter_sys=True)
    path = os.path.abspath(script)
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        raise refusal(f"argument SCRIPT: {error.strerror}: {script}") from None
    _import_from(os.path.dirname(os.path.realpath(script)))
    code = compile(source, path, "exec", dont_inherit=True)
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=path, __builtins__=__builtins__)

    def execute() -> None:
        # Pickle and spawned processes look here for the script's definitions.
        sys.modules["__main__"] = main
        exec(code, main.__dict__)

    return execute


def _import_from(directory: str) -> None:
    """Let the script import modules from there, instead of from where ``torchclip`` was started.

    In safe mode (``python -P``, ``PYTHONSAFEPATH``) Python adds neither.
    """
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):  # in 3.10 only as part of -I
        sys.path[0] = directory


def traceback_of_script(traceback: types.TracebackType | None) -> types.TracebackType | None:
    """The traceback without the frames that led to the script; None if it was never reached."""
    ours = (__name__, "torchclip.cli.run.command", "runpy")
    while traceback is not None and traceback.tb_frame.f_globals.get("__name__") in ours:
        traceback = traceback.tb_next
    return traceback
