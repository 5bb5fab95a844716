"""A training script as it is, with torchclip installed: the command ``torchclip run``.

At its end the command prints on stderr what clipping did and cost, as medians.
``torchclip.cli.run.recorder.Recorder`` says how that is measured.
"""

from __future__ import annotations

import argparse
import io
import os
import runpy
import sys
import time
import types
from collections.abc import Callable

import numpy as np

from torchclip import patch
from torchclip.cli.run.recorder import Cost, Recorder

__all__ = ["add_arguments", "report", "run"]


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
        OSError: if the script cannot be read.
        SystemExit: the script's.
    """
    sys.argv[:] = [script, *args]
    sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.realpath(script))
    main = _module(script) if module else _script(script)
    process = os.getpid()
    patch.install()
    recorder = Recorder()
    recorder.attach()
    start = time.perf_counter()
    try:
        return _status(main)
    finally:
        # A forked child that gets here has nothing to report, and of many ranks one is enough.
        if os.getpid() == process and os.environ.get("RANK", "0") == "0":
            sys.stdout.flush()
            print(report(recorder, time.perf_counter() - start), file=sys.stderr)


def _module(name: str) -> Callable[[], object]:
    return lambda: runpy.run_module(name, run_name="__main__", alter_sys=True)


def _script(path: str) -> Callable[[], object]:
    if os.path.isdir(path):
        return lambda: runpy.run_path(path, run_name="__main__")
    path = os.path.abspath(path)
    with io.open_code(path) as file:
        source = file.read()
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=path, __builtins__=__builtins__)

    def execute() -> None:
        # Pickles and processes that are spawned look here for what the script defines.
        sys.modules["__main__"] = main
        exec(compile(source, path, "exec", dont_inherit=True), main.__dict__)

    return execute


def _status(main: Callable[[], object]) -> int:
    """Call the script, and say what went wrong as Python would."""
    try:
        main()
    except SystemExit:
        raise
    except BaseException as error:
        error.__traceback__ = _of_script(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _of_script(traceback: types.TracebackType | None) -> types.TracebackType | None:
    """The traceback without the frames that led to the script."""
    while traceback is not None and traceback.tb_frame.f_globals.get("__name__") in (__name__, "runpy"):
        traceback = traceback.tb_next
    return traceback


def report(recorder: Recorder, seconds: float) -> str:
    """What clipping did and cost in a run of so many seconds, in a few lines."""
    lines = [_cost_line(name, cost, seconds) for name, cost in recorder.costs.items()]
    if not lines:
        lines.append(
            "torch's clipping functions were not called through torch.nn.utils; "
            "a torchclip.Clipper has its own history"
        )
    lines += _step_lines(recorder)
    return "\n".join(
        [f"torchclip: what clipping did in {_duration(seconds)}", *(f"  {line}" for line in lines)]
    )


def _cost_line(name: str, cost: Cost, seconds: float) -> str:
    line = f"{name}: {_count(cost.calls, 'call')}"
    if cost.ours:
        ours = float(np.median(cost.ours))
        line += f" of {_duration(ours)}"
    if cost.torch_error:
        return f"{line}; torch's own fails here ({cost.torch_error})"
    if not (cost.ours and cost.torchs):
        return f"{line}; torch's own was not measured"
    torchs = float(np.median(cost.torchs))
    saved = (torchs - ours) * cost.calls
    return (
        f"{line}; torch's own {_duration(torchs)} (measured {_count(len(cost.torchs), 'time')}): "
        f"{'saves' if saved >= 0 else 'costs'} {_duration(abs(saved))}, {abs(saved) / seconds:.1%} of the run"
    )


def _step_lines(recorder: Recorder) -> list[str]:
    summary = recorder.history.summary()
    if not summary.steps:
        return []
    lines = [
        f"clipped {summary.clipped:,} of {_count(summary.steps, 'time')} ({summary.clipped_share:.1%}); "
        f"non-finite norms: {summary.nonfinite:,}"
    ]
    finite = [record.total_norm for record in recorder.history if not record.nonfinite]
    if finite:
        latest = "" if summary.kept == summary.steps else f" of the last {summary.kept:,}"
        low, middle, high = np.quantile(finite, (0, 0.5, 1))
        lines.append(f"norm before clipping{latest}: min {low:.4g}, median {middle:.4g}, max {high:.4g}")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"
