"""Runs a script with several thresholds and seeds: a process for each run, one after another."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from torchclip.cli.run.files import read_csv
from torchclip.cli.run.report import REPORT, losses_of
from torchclip.cli.run.search import Outcome, search
from torchclip.cli.run.trial import CLASSES
from torchclip.history.history import History

AS_IT_IS = "as it is"
"""The name of the run without any change to the script's clipping."""

INTERRUPTED = "interrupted"
"""The problem of a run that Ctrl-C has ended; it shows nothing about its threshold."""

_SECONDS_TO_END = 20  # seconds that a run has after Ctrl-C to write its results
_SECONDS_BETWEEN_LOOKS = 0.02
_LAST_LINES = 10  # of a run that failed
_BLOCKS = 5  # of a run's tail, whose means show how much it varies


@dataclass(frozen=True)
class Command:
    """The command that runs with each threshold.

    Attributes:
        script: the arguments of ``torchclip run`` from the script on, with ``-m`` before a module.
        metric: finds the numbers to compare in a run's output, in place of the loss.
        maximize: whether larger numbers are better.
        seeds: the number of runs with each threshold.
    """

    script: Sequence[str]
    metric: re.Pattern[str] | None = None
    maximize: bool = False
    seeds: int = 1

    @property
    def what(self) -> str:
        """What is compared."""
        return "loss" if self.metric is None else "metric"

    def arguments(self, threshold: str, seed: int, csv: Path) -> list[str]:
        """The command line that runs the script with a threshold."""
        options = ["--threshold", threshold] if threshold in CLASSES else ["--max-norm", threshold]
        if threshold in ("none", AS_IT_IS):
            options = ["--none"] if threshold == "none" else []
        options += ["--add-to-seeds", str(seed)] if seed else []
        python = [sys.executable, *subprocess._args_from_interpreter_flags()]  # type: ignore[attr-defined]
        return [*python, "-m", "torchclip", "run", *options, "--csv", str(csv), *self.script]


@dataclass
class Run:
    """One run.

    Attributes:
        threshold: the threshold as given.
        seed: the number that was added to the script's seeds.
        histories: its steps, by optimizer.
        tail: the last losses, or the last numbers that ``--metric`` found.
        seconds: how long it took.
        problem: why it has no result, if so.
        error: the last lines that it printed, if it failed.
    """

    threshold: str
    seed: int = 0
    histories: dict[str, History] = field(default_factory=dict)
    tail: list[float] = field(default_factory=list)
    seconds: float = 0.0
    problem: str = ""
    error: str = ""

    @property
    def losses(self) -> dict[str, list[float]]:
        """The losses by optimizer, of those that have any."""
        found = {label: losses_of(history) for label, history in self.histories.items()}
        return {label: losses for label, losses in found.items() if losses}

    @property
    def score(self) -> float:
        """The number to compare; ``nan`` if there is none."""
        return math.nan if self.problem or not self.tail else float(np.mean(self.tail))

    @property
    def spread(self) -> float:
        """How much the number varies within the run's tail; ``nan`` if that is not known."""
        if len(self.tail) < _BLOCKS:
            return math.nan
        return float(np.std([np.mean(block) for block in np.array_split(self.tail, _BLOCKS)], ddof=1))

    def read(self, status: int, csv: Path, log: str, metric: re.Pattern[str] | None) -> None:
        """Read what the run has written, after it has ended with this status."""
        output = log.partition(REPORT)[0]
        was_killed = status < 0  # perhaps while it was writing
        self.histories = read_csv(csv) if csv.exists() and not was_killed else {}
        if metric is None:
            losses = next(iter(self.losses.values()), [])
            self.tail = losses[-max(len(losses) // 10, 1) :]
        else:
            self.tail = [_number(match.group(match.lastindex or 0)) for match in metric.finditer(output)][-1:]
        if status < 0:
            self.problem = f"ended by {signal.Signals(-status).name}"
        elif status:
            self.problem = f"failed, exit status {status}"
            self.error = "\n".join(output.strip().splitlines()[-_LAST_LINES:])
        elif not self.tail:
            self.problem = "no line matched --metric" if metric is not None else self._without_loss()
        elif not math.isfinite(self.score):
            self.problem = f"the {'loss' if metric is None else 'metric'} is not finite"

    def _without_loss(self) -> str:
        steps = any(len(history) for history in self.histories.values())
        return "no loss was seen" if steps else "no optimizer took a step"


@dataclass
class Try:
    """The runs with one threshold, one for each seed."""

    threshold: str
    runs: list[Run]

    @property
    def score(self) -> float:
        """The mean of the runs' numbers; ``nan`` if one of them has none."""
        return float(np.mean([run.score for run in self.runs])) if self.runs else math.nan


class Tries:
    """Runs a command with several thresholds.

    Attributes:
        done: the thresholds that have been tried, in this order.
        seeds: the number of runs with each; 1 as soon as two runs with other seeds agree to the bit.
        has_agreed: whether two runs have.
        signal: the signal that has ended the runs, such as that of Ctrl-C; 0 if none has.
    """

    def __init__(self, command: Command) -> None:
        self.done: list[Try] = []
        self.seeds = command.seeds
        self.has_agreed = False
        self.signal = 0
        self._command = command

    @property
    def status(self) -> int:
        """The exit status: that of an interrupted command, or 1 if no run has ended well."""
        if self.signal:
            return 128 + self.signal
        return 0 if any(not run.problem for each in self.done for run in each.runs) else 1

    def all_of(self, thresholds: Sequence[str]) -> list[Try]:
        """Run with each of these thresholds; after a signal, returns only those that were started."""
        before = len(self.done)
        for threshold in thresholds:
            if not self.signal:
                self.done.append(Try(threshold, []))
                self._try(self.done[-1])
        return self.done[before:]

    def _try(self, found: Try) -> None:
        for seed in range(self.seeds):
            if self.signal or seed >= self.seeds:
                return
            run = self._run(found.threshold, seed)
            found.runs.append(run)
            result = run.problem or f"{self._command.what} {run.score:.4g}"
            if self._command.metric is None and len(run.losses) > 1:
                result = run.problem or "ended"
            which = f", run {seed + 1} of {self.seeds}" if self.seeds > 1 else ""
            line = f"torchclip: {found.threshold}{which}: {result}, {run.seconds:.3g} s"
            print(line, file=sys.stderr, flush=True)
            if seed == 1 and not run.problem and _same(*found.runs):
                self.seeds, self.has_agreed = 1, True

    def _run(self, threshold: str, seed: int) -> Run:
        run, start = Run(threshold, seed), time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="torchclip-try-") as directory:
            csv, log = Path(directory, "steps.csv"), Path(directory, "log")
            with log.open("wb") as output:
                status = self._wait(self._command.arguments(threshold, seed, csv), output)
            run.seconds = time.perf_counter() - start
            run.read(status, csv, log.read_text(encoding="utf-8", errors="replace"), self._command.metric)
        if self.signal and status:
            run.problem, run.error = INTERRUPTED, ""
        return run

    def _wait(self, arguments: Sequence[str], output: IO[bytes]) -> int:
        """The exit status of a run; a signal asks it to end, a second one or some time later ends it."""
        # In its own session, so that Ctrl-C reaches it once, through this process.
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={"PYTHONUNBUFFERED": "1", **os.environ},
            start_new_session=True,
        )
        # Shells let background processes, and their children, ignore Ctrl-C.
        is_ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        request = signal.SIGTERM if is_ignored else signal.SIGINT
        deadline = math.inf

        def end(number: int, _: object) -> None:
            nonlocal deadline
            deadline = 0.0 if self.signal else time.monotonic() + _SECONDS_TO_END
            self.signal = number
            if os.name != "nt":  # there the console has told it
                process.send_signal(request)

        before = {
            number: signal.signal(number, end)
            for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None))
            if number is not None and signal.getsignal(number) != signal.SIG_IGN
        }
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        if self.signal and os.name == "nt":
            process.kill()
        elif self.signal:
            with contextlib.suppress(ProcessLookupError):  # also what the run has started, if it still exists
                os.killpg(process.pid, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)
        return process.wait()

    def auto(self) -> None:
        """Search, from the advice of a run that is not clipped."""

        def run(thresholds: Sequence[float]) -> list[Outcome]:
            tried = self.all_of(["none" if math.isinf(each) else f"{each:g}" for each in thresholds])
            runs = [run for each in self.done for run in each.runs]
            if self.signal or all(run.problem.startswith("failed") for run in runs):
                return []
            sign = -1.0 if self._command.maximize else 1.0
            return [
                Outcome(norm, _or_inf(sign * each.score), _first(each))
                for norm, each in zip(thresholds, tried, strict=True)
            ]

        search(run)


def _first(found: Try) -> History:
    """The steps of the first run, of an optimizer whose loss is known if there is one."""
    histories = found.runs[0].histories
    return histories.get(next(iter(found.runs[0].losses), ""), next(iter(histories.values()), History()))


def _same(first: Run, second: Run) -> bool:
    """Whether two runs agree to the bit."""
    return (
        bool(first.histories)
        and first.tail == second.tail
        and all(
            list(history) == list(second.histories.get(label, ()))
            for label, history in first.histories.items()
        )
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _or_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf
