"""Tries several thresholds on a script: a process for each, its log, and its result."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torchclip.cli.run.files import read_csv
from torchclip.cli.run.report import REPORT, losses_of
from torchclip.cli.run.search import Outcome, search
from torchclip.cli.thresholds import LEARNED
from torchclip.history.history import History
from torchclip.history.signs import final_loss

_SECONDS = 0.1  # seconds between two looks at the runs
_SECONDS_TO_END = 20  # seconds that a run has after Ctrl-C to write its results
_TAIL = 4096  # bytes at the end of a log that contain the last line
_KILL = getattr(signal, "SIGKILL", 9)
_CLOSE = 1.01  # a loss up to this many times the lowest is as good


@dataclass(frozen=True)
class Command:
    """The command that runs with each threshold.

    Attributes:
        script: the arguments of ``torchclip run`` from the script on, with ``-m`` before a module.
        metric: finds the number to compare in a run's output, instead of the loss.
    """

    script: Sequence[str]
    metric: re.Pattern[str] | None = None

    def arguments(self, threshold: str, csv: Path) -> list[str]:
        """The command line that runs the script with a threshold."""
        options = ["--threshold", threshold] if threshold in LEARNED else ["--max-norm", threshold]
        if threshold == "none":
            options = ["--none"]
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
    _process: subprocess.Popen[bytes] = field(init=False, repr=False)
    _started: float = field(init=False, repr=False)

    @property
    def history(self) -> History:
        """The steps of the optimizer whose loss is known, or of the first one."""
        found = [*self.histories.values()]
        return next((each for each in found if losses_of(each)), found[0] if found else History())

    @property
    def losses(self) -> list[float]:
        """The loss of each step that has one."""
        return losses_of(self.history)

    def start(self, command: Command, environment: Mapping[str, str]) -> None:
        """Start the run."""
        self._started = time.perf_counter()
        with self.log.open("wb") as log:
            # In its own session, so that Ctrl-C reaches it once, through this process.
            self._process = subprocess.Popen(
                command.arguments(self.threshold, self._csv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @property
    def _csv(self) -> Path:
        return self.log.with_suffix(".csv")

    def interrupt(self) -> None:
        """Send the run the signal of Ctrl-C; on Windows the console does so."""
        if os.name != "nt":
            # Shells let background processes, and their children, ignore Ctrl-C.
            is_ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            self._process.send_signal(signal.SIGTERM if is_ignored else signal.SIGINT)

    def kill(self) -> None:
        """End the run and all processes that it has started."""
        if os.name == "nt":
            self._process.kill()
        elif self._process.poll() is None:
            os.killpg(self._process.pid, _KILL)

    def last_line(self) -> str:
        """The last line that it printed, except torchclip's report."""
        with self.log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL, 0))
            lines = file.read().decode(errors="replace").partition(REPORT)[0].splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def has_ended(self, metric: re.Pattern[str] | None) -> bool:
        """Whether the run has ended; if so, reads what it has written."""
        status = self._process.poll()
        if status is None:
            return False
        self.seconds = time.perf_counter() - self._started
        was_killed = status == -_KILL  # perhaps while it was writing
        self.histories = read_csv(self._csv) if self._csv.exists() and not was_killed else {}
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
        return True

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
        directory: where the logs are.
    """

    def __init__(self, command: Command, tell: Callable[[Tries], object]) -> None:
        self.done: list[Try] = []
        self.running: list[Try] = []
        self.directory = Path(tempfile.mkdtemp(prefix="torchclip-try-"))
        self._command = command
        self._tell = tell
        self._signals: list[int] = []

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C, or a signal that asks this process to end, has ended the runs."""
        return bool(self._signals)

    @property
    def status(self) -> int:
        """The exit status: that of an interrupted command, or 1 if no run has ended well."""
        if self._signals:
            return 128 + self._signals[0]
        return 0 if any(not each.problem for each in self.done) else 1

    def all_of(self, thresholds: Sequence[str]) -> list[Try]:
        """Run with each of these thresholds; after Ctrl-C, returns only those that were started."""
        waiting = [Try(each, self.directory / f"{each}.log") for each in reversed(thresholds)]
        begun: list[Try] = []
        try:
            with _collected(self._signals):
                self._run(waiting, begun)
        finally:
            for each in self.running:  # after an error of this process
                each.kill()
        self.done[len(self.done) - len(begun) :] = begun
        return begun

    def _run(self, waiting: list[Try], begun: list[Try]) -> None:
        """Move runs from one list, from its end, to the other, until all have ended."""
        answered, deadline = 0, math.inf
        while self.running or (waiting and not self._signals):
            while waiting and not self.running and not self._signals:
                begun.append(waiting.pop())
                begun[-1].start(self._command, self._environment())
                self.running.append(begun[-1])
            if len(self._signals) > answered or time.monotonic() > deadline:
                for each in self.running:
                    each.kill() if answered else each.interrupt()
                answered = len(self._signals)
                deadline = min(deadline, time.monotonic() + _SECONDS_TO_END)
            for each in [each for each in self.running if each.has_ended(self._command.metric)]:
                self.running.remove(each)
                self.done.append(each)
            self._tell(self)
            time.sleep(_SECONDS)

    def auto(self) -> None:
        """Search, from the advice of a run that is not clipped."""

        def run(thresholds: Sequence[float]) -> list[Outcome]:
            given = ["none" if math.isinf(each) else f"{each:g}" for each in thresholds]
            begun = self.all_of(given)
            if self.interrupted or all(each.problem.startswith("failed") for each in self.done):
                return []
            return [
                Outcome(norm, each.score, each.history) for norm, each in zip(thresholds, begun, strict=True)
            ]

        search(run)

    def _environment(self) -> dict[str, str]:
        return {"PYTHONUNBUFFERED": "1", **os.environ}


@contextmanager
def _collected(received: list[int]) -> Iterator[None]:
    """Add the signals that end a process to a list; the runs have their own sessions, and do not get them."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    before = {number: signal.getsignal(number) for name in names if (number := getattr(signal, name, None))}
    heeded = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])


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


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
