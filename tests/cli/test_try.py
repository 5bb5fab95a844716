"""``torchclip run --try``: the script as it is and with each threshold, and whether the runs differ."""

import csv
import math
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import in_process
import numpy as np
import pytest
import torch

from torchclip.cli.main import main
from torchclip.cli.run import seeds
from torchclip.cli.run.search import Outcome, search
from torchclip.cli.run.tries import AS_IT_IS, Command, Run, Tries, Try
from torchclip.cli.run.verdict import compared, judged, verdict
from torchclip.history.history import History

run_here = in_process.run_here

# A quadratic whose loss at the end depends on the length of its clipped steps.
SCRIPT = """
import os, signal, sys, torch
weight = torch.nn.Parameter(torch.full((4,), 5.0))
optimizer = torch.optim.SGD([weight], lr=0.1)
for step in range(60):
    optimizer.zero_grad()
    loss = weight.square().sum()
    loss.backward()
    optimizer.step()
    print("score", loss.item() * 2)
if abs(weight.data[0].item()) > 4.9:
    sys.exit(7)
if abs(weight.data[0].item()) > 4.0:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def rows_of(output: str) -> dict[str, list[str]]:
    """The cells of the table's rows, by the first one."""
    heading, *table = output.partition("\n\n")[0].splitlines()
    assert heading.startswith("threshold")
    return {cells[0]: cells for cells in (re.split(" {2,}", line) for line in table)}


@pytest.mark.slow
def test_the_script_as_it_is_and_each_threshold_are_rows_below_a_verdict(
    run_here: in_process.Run, tmp_path: Path
) -> None:
    files = ["--csv", "a.csv", "--plot", "a.svg", "--html", "a.html"]
    done = run_here(SCRIPT, options=["--try", "0.010,0.1,1", "--seeds", "3", *files])
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    assert list(rows) == ["as it is", "0.010", "0.1", "1"]
    assert rows["as it is"][2:4] == ["20", "0.0%"]
    assert "failed, exit status 7" in rows["0.010"]
    assert "0.010, its last lines:" in done.stdout
    assert re.search(r"\nscore 19\d\.\d+\n", done.stdout)  # what it printed last
    assert "ended by SIGKILL" in rows["0.1"]
    assert rows["1"][2] == "worse"
    said = " ".join(done.stdout.split())
    assert "Runs with other seeds agree to the bit" in said
    assert "Leave the script as it is: nothing has a better loss at the end than its" in said
    assert "Clips most steps, so the learning rate alone sets how far most steps go: 0.010; 1." in said
    assert len(re.findall(r"torchclip: .*, \S+ s\n", done.stderr)) == 5
    assert not list(tmp_path.glob("torchclip-try-*"))
    with (tmp_path / "a.csv").open(newline="") as file:
        assert {row["optimizer"] for row in csv.DictReader(file)} == {
            "as it is",
            "as it is, seed + 1",
            "0.010",
            "1",
        }
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert all(f"<th>{name}</th>" in page for name in rows)
    assert page.index('<p class="verdict">Runs with other seeds') < page.index("<table>")
    assert "<h3>Advice</h3>" not in page
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_signal_ends_all_runs_and_keeps_what_is_there(run_here: in_process.Run, tmp_path: Path) -> None:
    script = """
        import os, subprocess, sys, time, torch
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for step in range(10):
            weight.grad = torch.ones(2)
            optimizer.step()
        print('score', 3.0)
        if os.path.exists('first'):
            with open('begun', 'w') as file:
                file.write(str(os.getpid()))
            code = "import os, time; alive = open('alive', 'w'); os.rename('begun', 'second'); time.sleep(60)"
            subprocess.Popen([sys.executable, '-c', f"{code}; alive.write('still')"])
            time.sleep(100)
        open('first', 'w').close()
    """

    def end() -> None:
        while not (tmp_path / "second").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)  # as Ctrl-C does

    os.mkfifo(tmp_path / "alive")
    alive = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    done = run_here(script, options=["--try", "0.5,7", "--metric", "score (.*)"])
    assert done.returncode == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "second").read_text()), 0)
    os.set_blocking(alive, True)
    assert os.read(alive, 9) == b""  # the end of the file: no process holds it
    os.close(alive)
    rows = rows_of(done.stdout)
    assert list(rows) == ["as it is", "0.5"]
    assert "interrupted" in rows["0.5"]
    assert "metric at the end" in done.stdout.splitlines()[0]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_each_run_gets_the_options_of_its_threshold_and_its_seed() -> None:
    def options(threshold: str, seed: int = 0) -> list[str]:
        arguments = Command(["-m", "script"]).arguments(threshold, seed, Path("a.csv"))
        assert arguments[-4:] == ["--csv", "a.csv", "-m", "script"]
        return arguments[arguments.index("run") + 1 : -4]

    assert options(AS_IT_IS) == []
    assert options("0.010", 2) == ["--max-norm", "0.010", "--add-to-seeds", "2"]
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
        (["--try", "1", "--seeds", "0"], "argument --seeds: must be a whole number above 0, got '0'"),
        (["--try", "1", "--maximize"], "--maximize goes with --metric only"),
        (["--none", "--max-norm", "1"], "--none and --max-norm do not go together"),
        (["--none", "--threshold", "zscore"], "--none and --threshold do not go together"),
        (["--threshold", "rolling-sigma", "--max-norm", "1"], "--max-norm has no meaning with"),
        (
            ["--max-norm", "0.0"],
            "argument --max-norm: must be above 0, got '0.0', which makes every gradient 0; to clip",
        ),
        (["--metric", "x"], "--metric goes with --try only"),
        (["--seeds", "2"], "--seeds goes with --try only"),
        (["--maximize"], "--maximize goes with --try only"),
        (["--try", "1", "--metric", "("], "argument --metric: must be a regular expression, got '('"),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run", *arguments, "script.py"])
    assert message in capsys.readouterr().err


# Seeds


@pytest.fixture
def plus_two(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = [(owner, name) for owner, names in seeds._FUNCTIONS for name in names]
    for owner, name in (*functions, *(each[:2] for each in seeds._CLASSES)):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # which puts it back at the end
    seeds.add_to_seeds(2)


DRAWS: dict[str, Callable[[int], float]] = {
    "torch.manual_seed": lambda seed: (torch.manual_seed(seed), torch.rand(()).item())[1],
    "torch.random.manual_seed": lambda seed: (torch.random.manual_seed(seed), torch.rand(()).item())[1],
    "torch.Generator": lambda seed: torch.rand((), generator=torch.Generator().manual_seed(seed)).item(),
    "numpy.random.seed": lambda seed: (np.random.seed(seed=seed), np.random.rand())[1],
    "numpy.random.default_rng": lambda seed: np.random.default_rng(np.int64(seed)).random(),
    "numpy.random.RandomState": lambda seed: np.random.RandomState(seed).rand(),
    "numpy.random.SeedSequence": lambda seed: np.random.Generator(
        np.random.PCG64(np.random.SeedSequence(seed))
    ).random(),
    "random.seed": lambda seed: (random.seed(seed), random.random())[1],
    "random.Random": lambda seed: random.Random(seed).random(),
}
EXPECTED = {name: draw(7) for name, draw in DRAWS.items()}


@pytest.mark.usefixtures("plus_two")
@pytest.mark.parametrize("name", DRAWS)
def test_a_number_is_added_to_each_seed(name: str) -> None:
    assert DRAWS[name](5) == EXPECTED[name]


@pytest.mark.usefixtures("plus_two")
def test_what_is_no_number_stays_a_seed_and_a_script_without_seeds_gets_other_numbers() -> None:
    assert random.Random("text").random() == random.Random("text").random()
    assert np.random.default_rng(None).random() != np.random.default_rng(None).random()
    first = torch.initial_seed()
    seeds.add_to_seeds(1)
    assert torch.initial_seed() > first


# The verdict


def history_of(norms: Sequence[float], max_norm: float = math.inf) -> History:
    history = History()
    for step, norm in enumerate(norms):
        history.append(step, norm, max_norm, min(max_norm / norm, 1.0), loss=norm)
    return history


def tried(threshold: str, *scores: float | str, spread: float = 0.01) -> Try:
    """Runs with these numbers at the end, or these problems, which vary within the tail."""
    steps = spread * np.repeat(np.linspace(-1.0, 1.0, 5), 4)
    return Try(
        threshold,
        [
            Run(threshold, seed, problem=score)
            if isinstance(score, str)
            else Run(threshold, seed, tail=(score + steps).tolist())
            for seed, score in enumerate(scores)
        ],
    )


@pytest.mark.parametrize(
    ("own", "reference", "expected"),
    [
        # The variation within the tail decides between one run each.
        ([2.144], [2.147], "no difference"),
        ([2.0], [2.147], "better"),
        ([2.147], [2.0], "worse"),
        ([2.0], [2.0], "no difference"),
        ([2.0], [13.0], "better"),
        # Differences between runs with the same seed decide between several.
        ([2.0, 2.1, 2.2], [2.1, 2.21, 2.29], "better"),
        ([2.1, 2.21, 2.29], [2.0, 2.1, 2.2], "worse"),
        ([2.0, 2.4, 2.2], [2.1, 2.21, 2.29], "no difference"),
        ([2.0, 2.1], [2.1, 2.21], "no difference"),
        # Runs without a result.
        ([2.0], ["failed"], "better"),
        (["failed"], [2.0], "worse"),
        (["failed"], ["failed"], "unknown"),
        ([2.0, 2.0, 2.0], ["failed", 2.1, 2.1], "unknown"),
    ],
)
def test_runs_are_compared(own: list[Any], reference: list[Any], expected: str) -> None:
    assert compared(tried("1", *own), tried(AS_IT_IS, *reference)) == expected


def test_with_maximize_more_is_better() -> None:
    assert compared(tried("1", 3.0), tried(AS_IT_IS, 2.0), maximize=True) == "better"


def test_a_metric_of_one_run_has_no_variation() -> None:
    of_one = Try("1", [Run("1", tail=[2.0])]), Try(AS_IT_IS, [Run(AS_IT_IS, tail=[2.1])])
    assert compared(*of_one) == "unknown"


def tries_of(*found: Try, has_agreed: bool = False) -> Tries:
    tries = Tries(Command(["script.py"]))
    tries.done, tries.has_agreed = list(found), has_agreed
    return tries


METRIC = Command([], re.compile("x"), maximize=True)
# Of the loss, or of a metric of which more is better.
VERDICTS: list[tuple[list[Try], str]] = [
    (
        [tried(AS_IT_IS, 2.147), tried("8", 2.144), tried("none", 2.15)],
        "Leave the script as it is: no difference was found. max_norm=8 has the lowest loss at the end, "
        "2.144 in place of 2.147, but chance alone makes runs differ as much.",
    ),
    (
        [tried(AS_IT_IS, 2.0), tried("8", 1.99999999)],
        "Leave the script as it is: nothing has a better loss at the end than its 2. No difference was "
        "found.",
    ),
    (
        [tried(AS_IT_IS, 2.0), tried("8", 3.0), tried("none", "failed, exit status 1"), tried("1", 2.001)],
        "Leave the script as it is: nothing has a better loss at the end than its 2. Worse: max_norm=8, no "
        "clipping.",
    ),
    (
        [tried(AS_IT_IS, 2.0), tried("8", 2.001)],
        "Leave the script as it is: nothing has a better loss at the end than its 2. No difference was "
        "found.",
    ),
    (
        [tried(AS_IT_IS, 3.0), tried("8", 2.0), tried("zscore", 2.01)],
        "Use max_norm=8: the loss at the end is 2; with the script as it is: 3. That is more than chance, as "
        "far as one run each shows; --seeds 3 makes sure. No difference from it was found for --threshold "
        "zscore.",
    ),
    (
        [tried(AS_IT_IS, 20.0, 21.0, 22.0), tried("none", 190.0, 191.0, 192.5)],
        "Use no clipping: the metric at the end is 191.2; with the script as it is: 21. That is more than "
        "chance.",
    ),
    (
        [tried(AS_IT_IS, "the loss is not finite"), tried("1", 2.0)],
        "Use max_norm=1: the loss at the end is 2; with the script as it is: the loss is not finite. That is "
        "more than chance, as far as one run each shows; --seeds 3 makes sure.",
    ),
    (
        [tried(AS_IT_IS, 20.0, spread=math.nan), tried("1", 22.0, spread=math.nan)],
        "Cannot tell: max_norm=1 has the highest metric at the end, 22, but these runs do not show how much "
        "it varies by chance. Use --seeds 3.",
    ),
    (
        [tried(AS_IT_IS, "failed, exit status 1"), tried("1", "failed, exit status 1")],
        "No verdict: no threshold has a loss at the end of its runs.",
    ),
    (
        [tried(AS_IT_IS, 2.0), tried("1", "interrupted")],
        "No verdict: there is nothing to compare.",
    ),
]


@pytest.mark.parametrize(("found", "expected"), VERDICTS)
def test_the_verdict_says(found: list[Try], expected: str) -> None:
    command = METRIC if "metric" in expected else Command([])
    for each in found:
        for run in each.runs:
            if any(map(math.isnan, run.tail)):  # a single number
                run.tail = [22.0 if each.threshold == "1" else 20.0]
    assert verdict(tries_of(*found), command) == expected


def test_seeds_that_change_nothing_are_said() -> None:
    text = verdict(tries_of(tried(AS_IT_IS, 2.0), tried("1", 3.0), has_agreed=True), Command([]))
    assert text.startswith("Runs with other seeds agree to the bit, so they show nothing about chance: ")


def test_of_several_losses_there_is_no_verdict_without_a_metric() -> None:
    losses = {"generator (Adam)": history_of([1.0]), "critic (Adam)": history_of([1.0])}
    runs = [Try(name, [Run(name, histories=losses, tail=[1.0])]) for name in (AS_IT_IS, "1")]
    assert verdict(tries_of(*runs), Command([])) == (
        "No verdict: generator (Adam) and critic (Adam) have a loss each, and which of them matters is not "
        "known. Give --metric."
    )
    assert "No verdict" not in verdict(tries_of(*runs), METRIC)


def test_what_thresholds_did_in_a_trial_is_judged_in_a_sentence_each() -> None:
    norms = np.random.default_rng(0).lognormal(sigma=0.3, size=200)
    exploding = (norms * np.where(np.arange(200) < 100, 1, 100)).tolist()
    runs = [
        (AS_IT_IS, norms.tolist(), 2.0),
        ("0.1", norms.tolist(), 0.1),
        ("0.2", norms.tolist(), 0.2),
        ("99", norms.tolist(), 99.0),
        ("10", exploding, 10.0),
    ]
    found = [
        Try(name, [Run(name, histories={"SGD": history_of(of_run, max_norm)})])
        for name, of_run, max_norm in runs
    ]
    assert judged(found) == [
        "Clips most steps, so the learning rate alone sets how far most steps go: 0.1; 0.2.",
        "Never clips: 99.",
        "Did not keep the norms in their range: 10.",
    ]


CSV = "step,total_norm,max_norm,clip_coef,skipped,loss,clipped_norm,optimizer\n"


@pytest.mark.parametrize(
    ("status", "steps", "log", "metric", "problem"),
    [
        (0, CSV, "", None, "no optimizer took a step"),
        (0, CSV + "0,1.0,inf,1.0,False,,1.0,SGD\n", "", None, "no loss was seen"),
        (0, CSV + "0,1.0,inf,1.0,False,nan,1.0,SGD\n", "", None, "the loss is not finite"),
        (0, CSV, "score none", "score (.*)", "the metric is not finite"),
        (0, CSV, "", "score (.*)", "no line matched --metric"),
        (3, CSV, "", None, "failed, exit status 3"),
        (-signal.SIGTERM, CSV, "", None, "ended by SIGTERM"),
    ],
)
def test_why_a_run_has_no_result_is_said(
    status: int, steps: str, log: str, metric: str | None, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text(steps, encoding="utf-8")
    run = Run("1")
    run.read(status, tmp_path / "a.csv", log, None if metric is None else re.compile(metric))
    assert run.problem == problem


@pytest.mark.slow
def test_optimizers_with_a_loss_each_have_a_column_each_and_no_verdict(run_here: in_process.Run) -> None:
    script = """
        import torch
        weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        first, second = [torch.optim.SGD([weight], lr=0.1) for weight in weights]
        for _ in range(60):
            for weight, optimizer in zip(weights, (first, second)):
                optimizer.zero_grad()
                weight.square().sum().backward()
                optimizer.step()
    """
    done = run_here(script, options=["--try", "none"])
    assert done.returncode == 0, done.stderr
    heading = done.stdout.splitlines()[0]
    assert "loss at the end of first (SGD)  loss at the end of second (SGD)" in heading
    said = " ".join(done.stdout.split())
    assert "No verdict: first (SGD) and second (SGD) have a loss each, and which" in said


# The search


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
    """Runs without processes: a function gives each run's number or problem."""

    def __init__(self, score_of: Callable[[str], float | str], maximize: bool = False) -> None:
        super().__init__(Command(["script.py"], maximize=maximize))
        self._score_of = score_of

    def all_of(self, thresholds: Sequence[str]) -> list[Try]:
        begun = [tried(each, self._score_of(each)) for each in thresholds]
        self.done += begun
        return begun


@pytest.mark.parametrize("maximize", [False, True])
def test_auto_searches_until_both_sides_are_worse(maximize: bool) -> None:
    sign = -1.0 if maximize else 1.0
    runs = Runs(lambda name: sign * (9.0 if name == "none" else abs(math.log(float(name) / 2.0))), maximize)
    runs.auto()
    names = [each.threshold for each in runs.done]
    assert names[0] == "none"
    assert 4 <= len(names) <= 8
    assert runs.status == 0


def test_a_script_that_always_fails_is_not_searched_to_the_end() -> None:
    runs = Runs(lambda _: "failed, exit status 1")
    runs.auto()
    assert [each.threshold for each in runs.done] == ["none"]
    assert runs.status == 1


def test_an_interrupted_search_keeps_what_it_has() -> None:
    given = iter([[Outcome(math.inf, 1.0, History())], []])
    assert len(search(lambda _: next(given))) == 1
