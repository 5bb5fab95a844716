"""``torchclip run --try``: the script once for each threshold, and which one to take."""

import csv
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

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


def tried(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "script.py").write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, "-m", "torchclip", "run", *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "TMPDIR": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def rows_of(output: str) -> dict[str, str]:
    """The rows of the table by how they begin."""
    table = output.partition("\n\n")[0].splitlines()[1:]
    return {line.split()[0]: line for line in table}


@pytest.mark.slow
def test_each_threshold_is_a_row_and_the_best_is_recommended(tmp_path: Path) -> None:
    done = tried(
        tmp_path,
        *("--try", "0.010,none,zscore", "--jobs", "2"),
        *("--csv", "a.csv", "--plot", "a.svg", "--html", "a.html", "script.py", "0.01"),
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    assert list(rows) == ["0.010", "none", "zscore"]
    assert re.search(r"100\.0%", rows["0.010"])
    assert re.search(r" 0\.0%", rows["none"])
    assert " 20 " in rows["none"]  # the largest norm
    assert re.search(r"Use (no clipping|--threshold zscore): it has the lowest loss at the end", done.stdout)
    assert len(re.findall(r"torchclip: \S+: \S+, \S+ s", done.stderr)) == 3
    logs = Path(re.findall(r"logs: (.*)", done.stdout)[0])
    assert {path.name for path in logs.glob("*.log")} == {f"{name}.log" for name in rows}
    assert "score 200" in (logs / "none.log").read_text()
    with (tmp_path / "a.csv").open(newline="") as file:
        assert {row["optimizer"] for row in csv.DictReader(file)} == set(rows)
    page = (tmp_path / "a.html").read_text()
    assert all(f"<th>{name}</th>" in page for name in rows)
    assert "Loss of each run" in page
    assert "script.py 0.01" in page
    picture = (tmp_path / "a.svg").read_text()
    assert "<svg" in picture


@pytest.mark.slow
def test_a_run_that_fails_is_a_row_that_says_so(tmp_path: Path) -> None:
    done = tried(tmp_path, "--try", "0.01,10", "--metric", r"score (\S+)", "script.py", "0.1", "fail")
    assert done.returncode == 0
    rows = rows_of(done.stdout)
    assert "failed, exit status 7" in rows["0.01"]
    assert "0.01: score 1" in done.stdout  # what it printed last
    assert "Use max_norm=10: it has the lowest metric at the end" in done.stdout
    assert "metric at the end" in done.stdout.splitlines()[0]


@pytest.mark.slow
def test_a_signal_ends_all_runs_and_keeps_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "wait.py").write_text(
        "import os, sys, time, torch\n"
        "weight = torch.nn.Parameter(torch.ones(2))\n"
        "optimizer = torch.optim.SGD([weight], lr=0.1)\n"
        "for step in range(10):\n"
        "    weight.grad = torch.ones(2)\n"
        "    optimizer.step()\n"
        "print('score', 3.0)\n"
        "if os.path.exists('first'):\n"
        "    open('second', 'w').write(str(os.getpid()))\n"
        "    time.sleep(100)\n"
        "open('first', 'w').close()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "torchclip", "run", "--try", "2,0.5,7", "--metric", "score (.*)", "wait.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not (tmp_path / "second").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # as Ctrl-C does
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "second").read_text()), 0)
    rows = rows_of(output)
    assert list(rows) == ["2", "0.5"]
    assert "interrupted" in rows["0.5"]
    assert "Use max_norm=2" in output


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
        (["--jobs", "2"], "--jobs goes with --try only"),
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
    """Runs without processes: each ends with the loss, or the problem, that a function says."""

    def __init__(self, loss_of: Callable[[str], float | str]) -> None:
        super().__init__(Command(["script.py"]), 1, lambda _: None)
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
