"""Tries several thresholds on a script: a process for each, its log, and its result."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torchclip.cli.run.files import read_csv
from torchclip.cli.run.report import REPORT
from torchclip.cli.run.search import Outcome, search
from torchclip.cli.thresholds import LEARNED
from torchclip.history.history import History
from torchclip.history.signs import final_loss

__all__ = ["Command", "Tries", "Try", "recommended"]

_SECONDS_TO_END = 20  # seconds that a run has after Ctrl-C to write its results
_TAIL = 4096  # bytes at the end of a log that contain the last line
_KILL = getattr(signal, "SIGKILL", 9)
_CLOSE = 1.01  # a loss up to this many times the lowest is as good


@dataclass(frozen=True)
class Command:
    """The command that runs with each threshold.

    Attributes:
        script: the arguments of ``torchclip run`` from the script on, with ``-m`` before a module.
        nonfinite: the value of ``--nonfinite``, or None.
        metric: finds the number to compare in a run's output, instead of the loss.
    """

    script: Sequence[str]
    nonfinite: str | None = None
    metric: re.Pattern[str] | None = None

    def arguments(self, threshold: str, csv: Path) -> list[str]:
        """The command line that runs the script with a threshold."""
        options = ["--threshold", threshold] if threshold in LEARNED else ["--max-norm", threshold]
        if threshold == "none":
            options = ["--none"] if self.nonfinite is None else ["--max-norm", "inf"]
        options += [] if self.nonfinite is None else ["--nonfinite", self.nonfinite]
        python = [sys.executable, *subprocess._args_from_interpreter_flags()]  # type: ignore[attr-defined]
        return [*python, "-m", "torchclip", "run", *options, "--csv", str(csv), *self.script]


@dataclass
class Try:
    """A run with one threshold.

    Attributes:
        threshold: the threshold as given.
        log: the file for its output.
        score: the final loss, or the number that ``--metric`` found; ``inf`` if it is not known.
        histories: its steps, by optimizer.
        seconds: how long it took.
        problem: why it has no result, if so.
        error: the last line that it printed, if it failed.
    """

    threshold: str
    log: Path
    score: float = math.inf
    histories: dict[str, History] = field(default_factory=dict)
    seconds: float = 0.0
    problem: str = ""
    error: str = ""

    @property
    def history(self) -> History:
        """The steps of the optimizer whose loss is known, or of the first one."""
        found = [*self.histories.values()]
        return next((each for each in found if _losses(each)), found[0] if found else History())

    @property
    def losses(self) -> list[float]:
        """The loss of each step that has one."""
        return _losses(self.history)

    @property
    def largest(self) -> float:
        """The largest finite norm of all optimizers, ``nan`` if there is none."""
        found = [each.summary().largest_norm for each in self.histories.values()]
        return max((norm for norm in found if not math.isnan(norm)), default=math.nan)

    @property
    def clipped(self) -> float:
        """The share of the steps that were clipped."""
        summaries = [each.summary() for each in self.histories.values()]
        steps = sum(summary.steps for summary in summaries)
        return sum(summary.clipped for summary in summaries) / steps if steps else 0.0

    @property
    def spikes(self) -> int:
        """How many steps had a norm far above those around them."""
        return sum(each.suggest().spikes for each in self.histories.values())

    def last_line(self) -> str:
        """The last line that it printed, except torchclip's report."""
        with self.log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL, 0))
            lines = file.read().decode(errors="replace").partition(REPORT)[0].splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def read(self, csv: Path, status: int, metric: re.Pattern[str] | None) -> None:
        """Read what the run has written after it ended with this exit status."""
        was_killed = status == -_KILL  # perhaps while it was writing
        self.histories = read_csv(csv) if csv.exists() and not was_killed else {}
        if metric is None:
            self.score = final_loss(self.losses)
        else:
            text = self.log.read_text(encoding="utf-8", errors="replace").partition(REPORT)[0]
            found = [match.group(match.lastindex or 0) for match in metric.finditer(text)]
            self.score = _number(found[-1]) if found else math.nan
        if status in (130, -signal.SIGINT, -signal.SIGTERM):
            self.problem = "interrupted"
        elif status:
            self.problem = f"failed, exit status {status}"
            self.error = self.last_line()
        elif math.isnan(self.score):
            self.problem = self._unknown(metric is not None)
        if self.problem or math.isnan(self.score):
            self.score = math.inf

    def _unknown(self, by_metric: bool) -> str:
        """Why there is no result."""
        if by_metric:
            return "no line matched --metric"
        if not any(len(each) for each in self.histories.values()):
            return "no optimizer took a step"
        return "the loss is not a number" if self.losses else "no loss was seen"


class Tries:
    """Runs a command with several thresholds, some at the same time.

    Attributes:
        done: the runs that have ended, in the order of their start.
        running: the runs that have not ended.
        interrupted: whether Ctrl-C, or a signal that asks this process to end, has ended them.
        directory: where the logs are.
    """

    def __init__(self, command: Command, jobs: int, tell: Callable[[Tries], object]) -> None:
        self.done: list[Try] = []
        self.running: list[Try] = []
        self.interrupted = False
        self.directory = Path(tempfile.mkdtemp(prefix="torchclip-try-"))
        self._command = command
        self._jobs = jobs
        self._tell = tell
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._received: list[int] = []

    @property
    def status(self) -> int:
        """The exit status: that of an interrupted command, or 1 if no run has ended well."""
        if self.interrupted:
            return 128 + (self._received or [signal.SIGINT])[0]
        return 0 if any(not each.problem for each in self.done) else 1

    def all_of(self, thresholds: Sequence[str]) -> list[Try]:
        """Run with each of these thresholds; after Ctrl-C, returns only those that were started."""
        tries = [Try(each, self.directory / f"{each}.log") for each in thresholds]
        with ThreadPoolExecutor(self._jobs) as pool, _ended_as_by_ctrl_c() as self._received:
            futures = [pool.submit(self._run, each) for each in tries]
            while True:
                try:
                    self._wait(futures)
                    break
                except KeyboardInterrupt:
                    for process in list(self._processes.values()):
                        _kill(process) if self.interrupted else _interrupt(process)
                    self.interrupted = True
        for future in futures:
            future.result()
        begun = [each for each in tries if each in self.done]
        self.done = [each for each in self.done if each not in begun] + begun
        return begun

    def auto(self) -> None:
        """Search, from the advice of a run that is not clipped."""

        def run(thresholds: Sequence[float]) -> list[Outcome]:
            given = ["none" if math.isinf(each) else f"{each:g}" for each in thresholds]
            by_name = {each.threshold: each for each in self.all_of(given)}
            found = [
                (norm, by_name[name]) for norm, name in zip(thresholds, given, strict=True) if name in by_name
            ]
            if self.interrupted or all(each.problem.startswith("failed") for each in self.done):
                return []
            return [Outcome(norm, each.score, each.history) for norm, each in found]

        search(run)

    def _wait(self, futures: Sequence[Future[None]]) -> None:
        while wait(futures, timeout=0.2).not_done:
            self._tell(self)
        self._tell(self)

    def _run(self, each: Try) -> None:
        if self.interrupted:
            return
        csv = each.log.with_suffix(".csv")
        start = time.perf_counter()
        with each.log.open("wb") as log:
            # In its own session, so that Ctrl-C reaches it once, through this process.
            process = subprocess.Popen(
                self._command.arguments(each.threshold, csv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )
            self._processes[each.threshold] = process
            if self.interrupted:
                _interrupt(process)
            self.running.append(each)
            status = self._wait_for(process)
        each.seconds = time.perf_counter() - start
        each.read(csv, status, self._command.metric)
        del self._processes[each.threshold]
        self.running.remove(each)
        self.done.append(each)

    def _wait_for(self, process: subprocess.Popen[bytes]) -> int:
        deadline = math.inf
        while True:
            try:
                return process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                now = time.monotonic()
                if self.interrupted:
                    deadline = min(deadline, now + _SECONDS_TO_END)
                if now > deadline:
                    _kill(process)

    def _environment(self) -> dict[str, str]:
        """The number of threads of each run, as parallel runs share the cores."""
        cores = os.cpu_count() or 1
        threads = {"OMP_NUM_THREADS": str(max(cores // self._jobs, 1))} if self._jobs > 1 else {}
        return {**threads, "PYTHONUNBUFFERED": "1", **os.environ}


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[list[int]]:
    """Have signals that end a process end it as Ctrl-C does; gives a list of those that came.

    The runs have sessions of their own, which these signals do not reach.
    """
    received: list[int] = []

    def end(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()  # other threads cannot set handlers
    names = ("SIGTERM", "SIGHUP") if is_main else ()
    before = {number: signal.signal(number, end) for name in names if (number := getattr(signal, name, None))}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """Send a run the signal of Ctrl-C; on Windows the console does so."""
    if os.name != "nt":
        # Shells let background processes, and their children, ignore Ctrl-C.
        is_ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        process.send_signal(signal.SIGTERM if is_ignored else signal.SIGINT)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a run and all processes that it has started."""
    if os.name == "nt":
        process.kill()
    elif process.poll() is None:
        os.killpg(process.pid, _KILL)


def recommended(tries: Sequence[Try], what: str = "loss") -> tuple[Try | None, str]:
    """The run to recommend, if there is one, and the reason."""
    good = sorted((each for each in tries if math.isfinite(each.score)), key=lambda each: each.score)
    if not good:
        return None, f"No threshold can be recommended: no run has a finite {what} at the end."
    best = good[0]
    name = "no clipping" if best.threshold == "none" else f"max_norm={best.threshold}"
    if best.threshold in LEARNED:
        name = f"--threshold {best.threshold}"
    text = f"Use {name}: it has the lowest {what} at the end, {best.score:.4g}."
    limit = best.score + (_CLOSE - 1) * abs(best.score)
    close = [each.threshold for each in good[1:] if each.score <= limit]
    if close:
        text += f" Within 1 % of it: {', '.join(close)}."
    unclipped = next((each for each in tries if each.threshold == "none"), None)
    if unclipped is not None and unclipped is not best and unclipped.threshold not in close:
        text += f" Without clipping it is {unclipped.score:.4g}." if unclipped.score < math.inf else ""
    return best, text


def _losses(history: History) -> list[float]:
    return [record.loss for record in history if record.loss is not None]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
