"""The command ``torchclip run``: runs any training script unchanged, and reports how it clips.

It sees every step of every torch optimizer, whether the script clips with torch's functions, with a Clipper,
through a framework, or not at all.  Options replace the script's own clipping for this run.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torchclip._core.extras import check_installed
from torchclip.cli.options import count, file_to_write, max_norm, picture_file, refusal
from torchclip.cli.run import seeds as seeding
from torchclip.cli.run.files import now, write_files
from torchclip.cli.run.mistakes import Remark
from torchclip.cli.run.recording import recording
from torchclip.cli.run.report import about, report, sections
from torchclip.cli.run.script import prepare, traceback_of_script
from torchclip.cli.run.steps import StepRecorder
from torchclip.cli.run.trial import CLASSES, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command; they come before the script."""
    parser.usage = "%(prog)s [OPTION ...] [-m] SCRIPT [ARGUMENT ...]"
    add = parser.add_argument
    add("-m", dest="module", action="store_true", help="SCRIPT is a module's name, as in python -m")
    add(
        "--max-norm",
        type=_above_0,
        metavar="X",
        help="clip to this norm in place of the script's own clipping",
    )
    add(
        "--threshold",
        choices=list(CLASSES),
        help="clip to a threshold that learns, with --max-norm as a ceiling: percentile: the 10th percentile "
        "of the norms so far (AutoClip); zscore: above the usual norm, so that only spikes are clipped "
        "(ZClip); adagc: the usual norm of each parameter (AdaGC); rolling-sigma: mean plus six standard "
        "deviations of the last norms",
    )
    add("--none", action="store_true", help="remove the script's own clipping")
    add(
        "--try",
        dest="tries",
        type=thresholds_to_try,
        metavar="X,Y,...",
        help="run the script as it is, and once for each of these thresholds (numbers, none, and the names "
        "that --threshold takes), and compare; auto: search, from the advice up and down by factors of 3",
    )
    add(
        "--metric",
        type=_pattern,
        metavar="REGEX",
        help="with --try: compare the last number that REGEX finds in the output of each run, in place "
        "of the loss over the last tenth of the steps; lower is better",
    )
    add("--maximize", action="store_true", help="with --metric: higher is better")
    add(
        "--seeds",
        type=count,
        metavar="N",
        help="with --try: run N times with each threshold, because runs also differ by chance; run i adds i "
        "to every seed that the script sets (default: 1)",
    )
    add(
        "--add-to-seeds",
        type=int,
        default=0,
        metavar="I",
        help="add this to every seed that the script sets, as --seeds does",
    )
    add(
        "--strict",
        action="store_true",
        help="exit with status 1 if the report names a mistake",
    )
    add("--plot", type=picture_file, metavar="FILE", help="draw the norms over the steps (PNG, SVG or PDF)")
    add("--csv", type=file_to_write, metavar="FILE", help="write a line for each step")
    add("--html", type=file_to_write, metavar="FILE", help="write a page with all of it, for a browser")
    add("script", metavar="SCRIPT", help="the training script, or with -m the module")
    rest = add(
        "args",
        metavar="ARGUMENT",
        nargs=argparse.REMAINDER,
        help="an argument of the script, such as --lr 0.1",
    )
    rest.required = False  # otherwise, until Python 3.12, the error for a missing SCRIPT mentions it, too


def _above_0(text: str) -> float:
    """A threshold above 0, with which training can proceed."""
    value = max_norm(text)
    if value == 0:
        raise argparse.ArgumentTypeError(
            f"must be above 0, got {text!r}, which makes every gradient 0; to clip nothing use --none"
        )
    return value


def thresholds_to_try(text: str) -> list[str]:
    """The thresholds as given, or ``["auto"]``."""
    found = [part.strip() for part in text.split(",")]
    seen: dict[float | str, str] = {}
    for each in found:
        if each == "auto" and len(found) > 1:
            raise argparse.ArgumentTypeError("auto searches by itself; give either auto or thresholds")
        value: float | str = math.inf if each == "none" else each
        if each not in ("auto", "none", *CLASSES):
            try:
                value = _above_0(each)
            except argparse.ArgumentTypeError as error:
                names = ", ".join(CLASSES)
                raise argparse.ArgumentTypeError(f"{error}; or none, auto, {names}") from None
        if value in seen:
            same = "twice" if seen[value] == each else f"and {seen[value]!r}, which are the same"
            raise argparse.ArgumentTypeError(f"has {each!r} {same}")
        seen[value] = each
    return found


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text, re.MULTILINE)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"must be a regular expression, got {text!r}: {error}") from None


def run(options: argparse.Namespace) -> int:
    """Run a script, or a module, as Python would; then report.

    The script becomes this process's ``__main__``, and remains so.

    Returns:
        The exit status.

    Raises:
        argparse.ArgumentError: if there is no such script, or options do not go together.
        SystemExit: the script's.
    """
    _check(options)
    if options.tries:
        from torchclip.cli.run.comparison import compare

        return compare(options)
    seeding.add_to_seeds(options.add_to_seeds)
    try:
        main = prepare(options.script, options.args, options.module)
    except (SyntaxError, ValueError) as error:  # the latter for null bytes, until Python 3.11
        sys.excepthook(type(error), error.with_traceback(None), None)
        return 1
    return _recorded(main, options)


def _check(options: argparse.Namespace) -> None:
    """Refuse options that do not go together, or that need packages that are not installed."""
    if options.threshold == "rolling-sigma" and options.max_norm:
        raise refusal("--max-norm has no meaning with --threshold rolling-sigma")
    if options.none:
        _refuse(options, "--none and {} do not go together", "max_norm", "threshold")
    try:
        if options.plot:
            check_installed("argument --plot:", "matplotlib")
        if options.html:
            check_installed("argument --html:", "jinja2", "matplotlib")
    except ModuleNotFoundError as error:
        raise refusal(str(error)) from None
    files = [path.resolve() for path in (options.plot, options.csv, options.html) if path]
    if len(set(files)) < len(files):
        raise refusal("--plot, --csv and --html must name different files")
    if not options.tries:
        _refuse(options, "{} goes with --try only", "metric", "maximize", "seeds")
        return
    with_try = "--try and {} do not go together; --try takes all thresholds, and none"
    _refuse(options, with_try, "max_norm", "threshold", "none", "strict")
    if options.maximize and not options.metric:
        raise refusal("--maximize goes with --metric only")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise refusal("--try starts processes of its own; do not start it with torchrun")
    if not options.module and not os.path.exists(options.script):
        raise refusal(f"argument SCRIPT: {os.strerror(errno.ENOENT)}: {options.script}")


def _refuse(options: argparse.Namespace, message: str, *names: str) -> None:
    """Refuse options that are given."""
    for name in names:
        if getattr(options, name):
            raise refusal(message.format(f"--{name.replace('_', '-')}"))


def _recorded(main: Callable[[], object], options: argparse.Namespace) -> int:
    """Run the script, report its errors as Python would, and show what was recorded.

    Returns:
        The exit status.
    """
    process = os.getpid()
    with recording(Trial(options.max_norm, options.threshold, options.none)) as recorded:
        start = time.perf_counter()
        error = _error_of(main)
        took = f"{time.perf_counter() - start:.3g} s"
    status, began = 0, True
    if isinstance(error, SystemExit):
        took += f", until sys.exit({error.code!r})" if error.code not in (None, 0) else ""
    elif error is not None:
        error.__traceback__ = traceback_of_script(error.__traceback__)
        began = error.__traceback__ is not None
        if not began and isinstance(error, ImportError):
            raise refusal(f"argument SCRIPT: {error}") from None
        sys.excepthook(type(error), error, error.__traceback__)
        interrupted = isinstance(error, KeyboardInterrupt)
        status, end = (130, "Ctrl-C") if interrupted else (1, type(error).__name__)
        took += f", until {end}"
    # A forked child that gets here has nothing to report, and one of many ranks is enough.
    if began and os.getpid() == process:
        remarks = recorded.mistakes.remarks()
        is_first = os.environ.get("RANK", "0") == "0"
        failed = _show(recorded, took, remarks, options) if is_first else 0
        is_wrong = options.strict and any(remark.is_mistake for remark in remarks)
        status = status or failed or int(is_wrong)
    if isinstance(error, SystemExit) and (error.code or not status):
        raise error
    return status


def _error_of(main: Callable[[], object]) -> BaseException | None:
    """Run the script; returns how it ended, if not normally."""
    try:
        main()
        # As Python does at a script's end: its threads are part of the run.
        for thread in threading.enumerate():
            if not thread.daemon and thread is not threading.current_thread():
                thread.join()
    except BaseException as error:
        return error
    return None


def _show(recorded: StepRecorder, took: str, remarks: Sequence[Remark], options: argparse.Namespace) -> int:
    """Print the report and write the files; returns the exit status if a file cannot be written."""
    if sys.stdout is not None:
        sys.stdout.flush()
    print(report(recorded, took, remarks), file=sys.stderr)
    histories = {label: section.history for label, section in sections(recorded).items()}

    def figure() -> Figure:
        from torchclip.history.figure import history_figure

        return history_figure({label: history.as_dict() for label, history in histories.items()})

    def html() -> str:
        from torchclip.history.page import page

        title = f"Gradient norms of {next(iter(histories))}" if len(histories) == 1 else "Gradient norms"
        what_ran = f"{' '.join([options.script, *options.args])}, {now()}, {took}"
        return page(title, histories, about(recorded, what_ran), remarks=list(map(str, remarks)))

    return write_files(options, histories, figure, html)
