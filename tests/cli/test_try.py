"""``torchclip run --try``: the script once for each threshold, and which one to take."""

import csv
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import in_process
import numpy as np
import pytest

from torchclip.cli.main import main
from torchclip.cli.run.search import Outcome, search
from torchclip.cli.run.tries import Command, Tries, Try, recommended
from torchclip.history.history import History

pytest.importorskip("rich")

# A quadratic whose loss at the end depends on the length of its clipped steps.
SCRIPT = """
import sys, torch
weight = torch.nn.Parameter(torch.full((4,), 5.0))
optimizer = torch.optim.SGD([weight], lr=float(sys.argv[1]))
for step in range(60):
    optimizer.zero_grad()
    loss = weight.square().sum()
    loss.backward()
    optimizer.step()
    print("score", loss.item() * 2)
sys.exit(7 if len(sys.argv) > 2 and abs(weight.data[0].item()) > 4.5 else 0)
"""


@pytest.fixture
def run_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> in_process.Run:
    return in_process.runner(tmp_path, monkeypatch, capfd)


def rows_of(output: str) -> dict[str, str]:
    """The rows of the table, by their first cell."""
    table = output.partition("\n\n")[0].splitlines()[1:]
    return {line.split()[0]: line for line in table}


@pytest.mark.slow
def test_each_threshold_is_a_row_and_the_best_is_recommended(
    run_here: in_process.Run, tmp_path: Path
) -> None:
    done = run_here(
        SCRIPT,
        *("0.1", "fail"),
        options=[
            *("--try", "0.010,none"),
            *("--csv", "a.csv", "--plot", "a.svg", "--html", "a.html"),
        ],
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    assert list(rows) == ["0.010", "none"]
    assert "failed, exit status 7" in rows["0.010"]
    assert "100.0%" in rows["0.010"]
    assert re.search(r"\n0.010: score 1\d+", done.stdout)  # what it printed last
    assert re.search(r" 0\.0%", rows["none"])
    assert " 20 " in rows["none"]  # the largest norm
    assert "Use no clipping: it has the lowest loss at the end" in done.stdout
    assert len(re.findall(r"torchclip: \S+: .*, \S+ s\n", done.stderr)) == 2
    logs = Path(re.findall(r"logs: (.*)", done.stdout)[0])
    assert {path.name for path in logs.glob("*.log")} == {f"{name}.log" for name in rows}
    assert "score 200" in (logs / "none.log").read_text()
    with (tmp_path / "a.csv").open(newline="") as file:
        assert {row["optimizer"] for row in csv.DictReader(file)} == set(rows)
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert all(f"<th>{name}</th>" in page for name in rows)
    assert "Loss of each run" in page
    assert "script.py 0.1" in page
    picture = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "<svg" in picture


@pytest.mark.slow
def test_a_signal_ends_all_runs_and_keeps_what_is_there(run_here: in_process.Run, tmp_path: Path) -> None:
    script = """
        import os, time, torch
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for step in range(10):
            weight.grad = torch.ones(2)
            optimizer.step()
        print('score', 3.0)
        if os.path.exists('first'):
            with open('begun', 'w') as file:
                file.write(str(os.getpid()))
            os.rename('begun', 'second')
            time.sleep(100)
        open('first', 'w').close()
    """

    def end() -> None:
        while not (tmp_path / "second").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)  # as Ctrl-C does

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    done = run_here(script, options=["--try", "2,0.5,7", "--metric", "score (.*)"])
    assert done.returncode == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "second").read_text()), 0)
    rows = rows_of(done.stdout)
    assert list(rows) == ["2", "0.5"]
    assert "interrupted" in rows["0.5"]
    assert "Use max_norm=2: it has the lowest metric at the end" in done.stdout
    assert "metric at the end" in done.stdout.splitlines()[0]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_each_run_gets_the_options_of_its_threshold() -> None:
    def options(threshold: str) -> list[str]:
        arguments = Command(["-m", "script"]).arguments(threshold, Path("a.csv"))
        assert arguments[-4:] == ["--csv", "a.csv", "-m", "script"]
        return arguments[arguments.index("run") + 1 : -4]

    assert options("0.010") == ["--max-norm", "0.010"]
    assert options("zscore") == ["--threshold", "zscore"]
    assert options("none") == ["--none"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--try", "0,1"], "argument --try: must be above 0, got '0'"),
        (
            ["--try", "1,two"],
            "argument --try: must be a number that is at least 0, got 'two'; or none, auto,",
        ),
        (["--try", "1,1"], "argument --try: has '1' twice"),
        (["--try", "1,1.0"], "argument --try: has '1.0' and '1', which are the same"),
        (["--try", "auto,1"], "argument --try: auto searches by itself; give either auto or thresholds"),
        (["--try", "1"], "argument SCRIPT: No such file or directory: script.py"),
        (["--try", "1", "--max-norm", "2"], "--try and --max-norm do not go together"),
        (["--try", "1", "--none"], "--try and --none do not go together"),
        (["--metric", "x"], "--metric goes with --try only"),
        (["--try", "1", "--metric", "("], "argument --metric: must be a regular expression, got '('"),
    ],
)
def test_what_cannot_be_tried_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run", *arguments, "script.py"])
    assert message in capsys.readouterr().err


# The search


def history_of(norms: Sequence[float]) -> History:
    history = History()
    for step, norm in enumerate(norms):
        history.append(step, norm, math.inf, 1.0)
    return history


@pytest.mark.parametrize("best", [1e-3, 0.3, 2.0, 50.0, 1e6])
def test_the_search_ends_with_worse_runs_on_both_sides(best: float) -> None:
    calls: list[float] = []
    norms = np.random.default_rng(0).lognormal(sigma=0.3, size=200).tolist()

    def run(thresholds: Sequence[float]) -> list[Outcome]:
        calls.extend(thresholds)
        return [Outcome(each, abs(math.log(min(each, 1e9) / best)), history_of(norms)) for each in thresholds]

    outcomes = search(run)
    assert calls[0] == math.inf
    assert [outcome.threshold for outcome in outcomes] == calls
    assert len(calls) == len(set(calls)) <= 8
    clipped = sorted(calls[1:])
    found = min(outcomes, key=lambda outcome: outcome.loss).threshold
    if 0.01 < best < 200:
        assert 1 / 2 < found / best < 2
        assert clipped[0] < found < clipped[-1]


def test_the_search_starts_somewhere_without_advice() -> None:
    outcomes = search(lambda thresholds: [Outcome(each, each, History()) for each in thresholds])
    assert outcomes[1].threshold == 1.0


class Runs(Tries):
    """Runs without processes: a function gives each run's loss or problem."""

    def __init__(self, loss_of: Callable[[str], float | str]) -> None:
        super().__init__(Command(["script.py"]), lambda _: None)
        self.directory.rmdir()  # no run writes anything
        self._loss_of = loss_of

    def all_of(self, thresholds: Sequence[str]) -> list[Try]:
        begun = []
        for each in thresholds:
            loss = self._loss_of(each)
            run = (
                Try(each, Path(), math.inf, problem=loss)
                if isinstance(loss, str)
                else Try(each, Path(), loss)
            )
            begun.append(run)
        self.done += begun
        return begun


def test_auto_searches_until_both_sides_are_worse() -> None:
    runs = Runs(lambda name: 9.0 if name == "none" else abs(math.log(float(name) / 2.0)))
    runs.auto()
    names = [each.threshold for each in runs.done]
    assert names[0] == "none"
    assert 4 <= len(names) <= 8
    _, words = recommended(runs.done)
    assert words.startswith("Use max_norm=")
    assert runs.status == 0


def test_a_script_that_always_fails_is_not_searched_to_the_end() -> None:
    runs = Runs(lambda _: "failed, exit status 1")
    runs.auto()
    assert [each.threshold for each in runs.done] == ["none"]
    assert runs.status == 1


def test_an_interrupted_search_keeps_what_it_has() -> None:
    given = iter([[Outcome(math.inf, 1.0, History())], []])
    assert len(search(lambda _: next(given))) == 1


def test_runs_that_are_as_good_are_named() -> None:
    scores = {"none": 3.0, "0.1": 2.0, "1": 2.01, "5": math.inf}
    best, words = recommended([Try(name, Path(), score) for name, score in scores.items()])
    assert best is not None
    assert best.threshold == "0.1"
    assert words.startswith("Use max_norm=0.1: it has the lowest loss at the end, 2. Within 1 % of it: 1.")
    assert words.endswith("Without clipping it is 3.")
    nothing, words = recommended([Try("1", Path())])
    assert nothing is None
    assert "no run has a finite loss" in words
