"""The command ``torchclip train``: what it learns, shows, writes and refuses."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_on_ranks
from distributed_helpers import FSDP2, TORCHRUN
from matplotlib.image import imread
from torch.distributed import TCPStore
from train_on_ranks import MODEL, trained

from torchclip import Percentile, Threshold, ZScore
from torchclip.cli.main import main
from torchclip.cli.train import figure, parallel, training
from torchclip.cli.train.model import load_model, sample
from torchclip.cli.train.options import LEARNING_RATES, MAX_NORMS, Options
from torchclip.history import History

# The sizes of the command's defaults, and small ones.
COMMAND: dict[str, Any] = {"hidden": 128, "batch": 32, "bptt": 64}
TINY = ["--steps", "6", "--hidden", "8", "--batch", "4", "--bptt", "10"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The status and the output of the command, with tiny settings unless others are given."""
    status = main(["train", *TINY, *map(str, arguments)])
    return status, capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which the command refuses its arguments."""
    with pytest.raises(SystemExit, match="2"):
        main(["train", *TINY, *map(str, arguments)])
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("torchclip train: error: ")
    assert output.err.count("\n") == 1
    return output.err


# A real Ctrl-C in the third step of the unclipped run; of several processes, only the last one gets it.
INTERRUPTED = """
import os, signal, sys
from torchclip.cli.train import training
from torchclip.cli.main import main

batches, pending = training.batches, [os.environ.get("RANK", "1") == "1"]

def interrupted_batches(*arguments):
    for step, batch in enumerate(batches(*arguments)):
        if step == 2 and any(pending):
            pending.clear()
            os.kill(os.getpid(), signal.SIGINT)
        yield batch

training.batches = interrupted_batches
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""


def without_gloo(output: str) -> str:
    """The output without gloo's lines: in torch 2.10 gloo prints its connections to standard output."""
    return "".join(line for line in output.splitlines(keepends=True) if not line.startswith("[Gloo]"))


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The outcome of a script or module on two processes."""
    result = subprocess.run(
        [sys.executable, *TORCHRUN, *map(str, arguments)], capture_output=True, encoding="utf-8", timeout=300
    )
    result.stdout = without_gloo(result.stdout)
    return result


def on_two_ranks(*arguments: str) -> list[tuple[int, str, str]]:
    """The outcome of Python on each of two processes that find each other as torchrun's do."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
        **{
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        },
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**environment, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for rank in "01"
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [
        (process.returncode, without_gloo(output), error)
        for process, (output, error) in zip(processes, outputs, strict=True)
    ]


def row(output: str, name: str) -> list[str]:
    """The cells of a run's row in the closing table."""
    line = next(line for line in output.splitlines() if line.strip().startswith(f"{name} "))
    return re.split(r"\s{2,}", line.strip())


def perplexity(run: training.Run) -> float:
    """Of the last 20 steps."""
    return math.exp(np.mean(run.losses[-20:]))


# What it learns


@pytest.mark.slow
def test_clipping_decides_whether_the_model_learns() -> None:
    # The command's defaults, shortened to 150 of their 300 steps.
    unclipped, clipped = trained(steps=150, **COMMAND)
    assert perplexity(clipped) < 12
    assert perplexity(unclipped) > 10 * perplexity(clipped)
    # How large depends on the text, Python's own documentation: 2,900 with 3.11's, 14 with 3.13's.
    assert max(record.total_norm for record in unclipped.history) > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threshold", "setting"),
    [("percentile", {"steps": 60}), ("zscore", {"steps": 110, "warmup": 100, "seed": 3})],
)
def test_a_threshold_that_learns_rescues_what_a_large_fixed_one_does_not(
    threshold: str, setting: dict[str, Any]
) -> None:
    (fixed,) = trained(only="clipped", max_norm=5.0, **COMMAND, **setting)
    (learned,) = trained(only="clipped", threshold=threshold, max_norm=math.inf, **COMMAND, **setting)
    assert perplexity(learned) < 20
    assert perplexity(fixed) > 10 * perplexity(learned)


def test_both_runs_start_from_the_same_weights_and_batches() -> None:
    unclipped, clipped = trained()
    norms = [[record.total_norm for record in run.history] for run in (unclipped, clipped)]
    assert norms[0][0] == norms[1][0]
    assert unclipped.losses[0] == clipped.losses[0]
    assert norms[0][-1] != norms[1][-1]
    assert unclipped.losses[-1] != clipped.losses[-1]


@pytest.mark.parametrize("cell", ["rnn", "lstm", "transformer"])
def test_same_seed_same_numbers(cell: str) -> None:
    first, again, other = (trained(cell=cell, seed=seed) for seed in (1, 1, 2))
    assert [list(run.history) for run in first] == [list(run.history) for run in again]
    assert list(first[0].history) != list(other[0].history)


def test_a_run_alone_has_the_numbers_that_it_has_beside_the_other() -> None:
    assert list(trained(only="clipped")[0].history) == list(trained()[1].history)


def test_gradients_are_clipped_to_the_threshold() -> None:
    # One step of SGD moves the weights by lr times the clipped gradient.
    options = Options(steps=1, **{**MODEL, "lr": 1.0, "max_norm": 0.01})
    tokens = torch.arange(200) % 7
    (run,) = training.start_runs("clipped", "abcdefg", options)
    before = torch.cat([p.detach().flatten().clone() for p in run.model.parameters()])
    training.advance([run], tokens, options)
    after = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    assert run.history[0].total_norm > 0.01
    assert (after - before).norm() == pytest.approx(0.01, rel=1e-3)


def test_the_learning_rate_rises_during_the_warm_up() -> None:
    # After a single step of SGD with the same gradients.
    def moved(warmup: int) -> float:
        before, after = (trained(steps=n, only="unclipped", warmup=warmup)[0].model for n in (0, 1))
        pairs = zip(before.parameters(), after.parameters(), strict=True)
        return float(torch.cat([(p - q).detach().flatten() for p, q in pairs]).norm())

    assert moved(4) == pytest.approx(moved(1) / 4, rel=1e-3)


def test_targets_are_the_characters_after_the_inputs() -> None:
    options = Options(steps=9, **MODEL)
    tokens = torch.arange(4 * 25)
    pairs = list(training.batches(tokens, options))
    assert len(pairs) == 9
    for inputs, targets in pairs:
        assert inputs.shape == (4, 10)
        assert torch.equal(targets, inputs + 1)
    assert torch.equal(pairs[1][0], pairs[0][0] + 10)


@pytest.mark.parametrize("ceiling", [math.inf, 2.0])
@pytest.mark.parametrize("threshold", ["percentile", "zscore"])
def test_a_threshold_that_learns_follows_the_norms(threshold: str, ceiling: float) -> None:
    unclipped, clipped = trained(steps=40, threshold=threshold, max_norm=ceiling)
    twins: dict[str, Threshold] = {
        "percentile": Percentile(10, max_norm=ceiling),
        "zscore": ZScore(max_norm=ceiling),
    }
    expected = [twins[threshold].update(record.total_norm) for record in clipped.history]
    assert [record.max_norm for record in clipped.history] == expected
    assert 0 < min(expected) < max(expected) <= ceiling
    assert {record.max_norm for record in unclipped.history} == {math.inf}


# What it shows


def test_closing_table_has_both_runs(capsys: pytest.CaptureFixture[str]) -> None:
    status, output = run(capsys)
    assert status == 0
    _, progress, loss, perplexity, norm, largest, share = row(output, "unclipped")
    assert (progress, share) == ("6 of 6", "–")
    assert float(perplexity) == pytest.approx(math.exp(float(loss)), rel=0.02)
    assert 0 < float(norm) <= float(largest)
    assert re.fullmatch(r"\d+%", row(output, "clipped")[-1])


def test_output_is_the_same_each_time_and_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    _, output = run(capsys, "--seed", 5)
    assert output == run(capsys, "--seed", 5)[1]
    assert output != run(capsys, "--seed", 6)[1]
    assert max(map(len, output.splitlines())) <= 80


def test_text_of_each_model_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    _, output = run(capsys)
    assert "written by the unclipped model" in output
    assert "written by the clipped model" in output


@pytest.mark.parametrize(("only", "other"), [("clipped", "unclipped"), ("unclipped", "clipped")])
def test_only_one_run(only: str, other: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, output = run(capsys, "--only", only)
    assert row(output, only)[1] == "6 of 6"
    assert not re.search(rf"^ *{other} ", output, re.MULTILINE)
    assert f"written by the {other}" not in output


def test_a_loss_that_is_not_finite_ends_the_run_and_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, output = run(capsys, "--lr", "3e38", "--plot", tmp_path / "plot.png")
    assert status == 0
    for name in ("unclipped", "clipped"):
        assert row(output, name)[1:4] in (["diverged at 2", loss, loss] for loss in ("nan", "inf"))
    assert "scores are not finite" in output


@pytest.mark.slow
def test_ctrl_c_shows_what_there_is(tmp_path: Path) -> None:
    plot, model = tmp_path / "plot.png", tmp_path / "model.pt"
    files = ["--plot", str(plot), "--save", str(model)]
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "train", *TINY, *files], capture_output=True, encoding="utf-8"
    )
    assert (result.returncode, result.stderr) == (130, "")
    assert [row(result.stdout, name)[1] for name in ("unclipped", "clipped")] == ["3 of 6", "3 of 6"]
    assert "Interrupted after step 3 of 6." in result.stdout
    assert "written by the clipped model" in result.stdout
    assert imread(plot).std() > 0.01
    load_model(model)


@pytest.fixture
def ctrl_c_interrupts() -> Iterator[None]:
    """A shell's background job would ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_breaks_off_the_second_time_and_after_the_training() -> None:
    with parallel.CtrlC() as ctrl_c:
        assert not ctrl_c.on_any_rank()
        signal.raise_signal(signal.SIGINT)
        assert ctrl_c.on_any_rank()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_threshold_of_0_clips_everything_away(capsys: pytest.CaptureFixture[str]) -> None:
    status, output = run(capsys, "--max-norm", "0")
    assert status == 0
    assert "Clipped to a norm of 0." in " ".join(output.split())
    assert row(output, "clipped")[-1] == "100%"
    (clipped,) = trained(only="clipped", max_norm=0.0)
    (fresh,) = trained(steps=0, only="clipped")
    assert all(map(torch.equal, clipped.model.parameters(), fresh.model.parameters()))


def test_a_threshold_of_inf_clips_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    status, output = run(capsys, "--max-norm", "inf")
    assert status == 0
    assert "Nothing is clipped: the threshold is inf." in " ".join(output.split())
    assert row(output, "clipped")[2:-1] == row(output, "unclipped")[2:-1]
    assert row(output, "clipped")[-1] == "0%"


# What it writes


@pytest.mark.parametrize("only", [[], ["--only", "clipped"]])
def test_plot_is_a_picture_with_something_in_it(
    only: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plot.png"
    _, output = run(capsys, "--plot", plot, *only)
    assert str(plot) in output
    assert imread(plot)[0, 0, 3] == 0  # transparent, for pages in the dark
    picture = imread(plot)[..., :3]
    colours = {"vermilion": (0xD5, 0x5E, 0x00), "blue": (0x00, 0x72, 0xB2), "gray": (0x80, 0x80, 0x80)}
    drawn = {
        name: (abs(picture - np.array(rgb) / 255) < 0.01).all(axis=-1).sum() > 50
        for name, rgb in colours.items()
    }
    assert drawn == {"vermilion": not only, "blue": True, "gray": True}


def columns_of(
    unclipped: list[float], clipped: list[float], max_norms: list[float]
) -> dict[str, dict[str, list[Any]]]:
    """The histories of two runs with these norms."""
    histories = {"unclipped": History(), "clipped": History()}
    for name, norms in (("unclipped", unclipped), ("clipped", clipped)):
        for step, (norm, max_norm) in enumerate(zip(norms, max_norms, strict=True)):
            limit = max_norm if name == "clipped" else math.inf
            histories[name].append(step, norm, limit, min(1.0, limit / norm), loss=norm)
    return {name: history.as_dict() for name, history in histories.items()}


@pytest.mark.parametrize(
    ("max_norms", "note", "label"),
    [
        ([0.5, 0.5, 0.5], "", "threshold 0.5"),
        ([0.5, 0.4, 0.5], "", "threshold"),
        ([0.5, 0.4, 0.5], "why", "threshold (why)"),
        ([math.inf, math.inf, 0.4], "", "threshold (from step 3 on, after learning from earlier steps)"),
        (
            [math.inf, 0.4, 0.3],
            "why",
            "threshold (from step 2 on, after learning from earlier steps; why)",
        ),
        ([math.inf] * 3, "why", None),
        ([0.0] * 3, "", None),
    ],
)
def test_plot_shows_the_threshold_where_there_is_one(
    max_norms: list[float], note: str, label: str | None
) -> None:
    runs = columns_of([3.0, 2.0, 2.0], [3.0, 1.0, 1.0], max_norms)
    _, axes = figure.training_figure(runs, note).axes
    dashed = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    drawn = {" ".join(str(line.get_label()).split()): line.get_ydata() for line in dashed}
    assert list(drawn) == ([label] if label else [])
    for values in drawn.values():
        np.testing.assert_array_equal(values, np.where(np.isinf(max_norms), np.nan, max_norms))


def test_plot_marks_the_steps_that_were_clipped() -> None:
    runs = columns_of([3.0, 2.0, 5.0], [3.0, 1.0, math.inf], max_norms=[2.0] * 3)
    _, axes = figure.training_figure(runs).axes
    (marks,) = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert marks.get_label() == "clipped (2 of 3 steps)"
    np.testing.assert_array_equal(marks.get_xdata(), [1, 3])
    np.testing.assert_array_equal(marks.get_ydata(), [3.0, math.nan])


def test_html_is_a_page_about_both_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "page.html"
    _, output = run(capsys, "--html", path)
    assert f"Page: {path}" in output
    page = path.read_text(encoding="utf-8")
    assert all(word in page for word in ("unclipped", "clipped", "recurrent.weight_hh_l0"))


@pytest.mark.parametrize("columns", ["40", "60", "80"])
def test_output_fits_the_terminal(
    columns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = tmp_path / "text.txt"
    text.write_text("Without the sign that stands for what was cut off, which a model might write. " * 50)
    _, output = run(capsys, "--text", text)
    assert max(map(len, output.splitlines())) <= int(columns)
    assert not any(line.endswith(" ") for line in output.splitlines())
    assert "…" not in output
    words = " ".join(output.split())
    assert all(number in words for number in ("loss", "perplexity", "6 of 6"))


@pytest.mark.parametrize("threshold", ["adagc", "rolling-sigma"])
def test_newer_thresholds(threshold: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = run(capsys, "--threshold", threshold)
    assert status == 0
    assert row(output, "clipped")[1] == "6 of 6"
    if threshold == "rolling-sigma":
        assert "--max-norm has no meaning" in refusal(capsys, "--threshold", threshold, "--max-norm", 1)


@pytest.mark.parametrize("cell", ["rnn", "lstm", "transformer"])
def test_saved_model_writes_the_same_text_when_loaded(
    cell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pt"
    _, output = run(capsys, "--cell", cell, "--save", path)
    assert str(path) in output
    model, vocabulary = load_model(path)
    trained_model: Any = trained(cell=cell, lr=LEARNING_RATES[cell], max_norm=MAX_NORMS[cell])[1].model
    written = [sample(m, vocabulary, length=50, seed=3) for m in (model, trained_model)]
    assert written[0] == written[1]
    assert len(written[0] or "") == 50


@pytest.mark.parametrize(
    ("cell", "name", "optimizer"),
    [("rnn", "Tanh RNN", "SGD"), ("lstm", "LSTM", "SGD"), ("transformer", "Transformer", "AdamW")],
)
def test_the_model_and_its_optimizer_are_named(
    cell: str, name: str, optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = " ".join(run(capsys, "--cell", cell)[1].split())
    assert f"{name} with 8 hidden units" in words
    assert f"6 steps of {optimizer}," in words


def test_text_is_read_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(("\ufeff" + "häßlich – schön\r\n" * 20).encode())
    _, output = run(capsys, "--text", path)
    assert "320 characters, 12 different" in " ".join(output.split())


# What it refuses


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "it has 0 characters"),
        (b"too short", "it has 9 characters, and --batch 4 with --bptt 10 needs 44"),
        (b"\xff" * 100, "is not UTF-8: invalid start byte at byte 0"),
    ],
)
def test_text_that_cannot_be_used(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert message in refusal(capsys, "--text", path)


def test_the_shortest_text_that_can_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcd" * 11, encoding="utf-8")
    assert run(capsys, "--text", path)[0] == 0


def test_python_without_its_documentation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "pass a text with --text FILE" in refusal(capsys)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--max-norm", value) for value in ("-1", "nan", "much", "")),
        *(("--lr", value) for value in ("-1", "0", "nan", "inf", "much")),
        *(
            (name, value)
            for name in ("--steps", "--warmup", "--hidden", "--batch", "--bptt")
            for value in ("0", "-3", "1.5")
        ),
        *(("--seed", value) for value in ("-1", str(2**63), "x")),
        ("--cell", "gru"),
        ("--threshold", "mean"),
        ("--only", "both"),
    ],
)
def test_bad_values(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, option, value)
    assert re.search(rf"argument {option}: (must be|invalid choice)", message)
    assert value in message


@pytest.mark.parametrize("option", ["--plot", "--save"])
def test_files_that_cannot_be_written(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "directory.png").mkdir()
    assert "is a directory" in refusal(capsys, option, tmp_path / "directory.png")
    assert "there is no directory" in refusal(capsys, option, tmp_path / "missing" / "file.png")


@pytest.mark.parametrize(("setting", "threads"), [(None, 1), ("2", 2)])
def test_it_works_on_one_thread_unless_told_otherwise(
    setting: str | None, threads: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if setting is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", setting)
    run(capsys)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_plot_is_of_the_kind_that_its_name_says(
    ending: str, begins: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _ = run(capsys, "--plot", tmp_path / f"plot.{ending}")
    assert status == 0
    assert (tmp_path / f"plot.{ending}").read_bytes().startswith(begins)


def test_plot_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "must end in .png, .svg or .pdf" in refusal(capsys, "--plot", tmp_path / "plot.jpg")


# On several processes


with_fsdp2 = pytest.mark.skipif(not FSDP2, reason="torch 2.6 has FSDP2 for accelerators only")


@with_fsdp2
@pytest.mark.slow
def test_two_processes_have_the_numbers_of_one() -> None:
    cases = [("rnn", "fixed"), ("lstm", "percentile")]
    (status, output, errors), _ = on_two_ranks(train_on_ranks.__file__, *map(",".join, cases))
    assert status == 0, errors
    for (cell, threshold), report in zip(cases, json.loads(output), strict=True):
        one = train_on_ranks.numbers(cell, threshold)
        assert report["ranks"] == 2
        assert report["ways"].keys() == {"fsdp", "ddp"}
        for two in report["ways"].values():
            np.testing.assert_allclose(two["steps"], one["steps"], rtol=1e-5)
            for weights, expected in zip(two["weights"], one["weights"], strict=True):
                assert weights.keys() == expected.keys()
                for name in weights:
                    np.testing.assert_allclose(weights[name], expected[name], rtol=1e-4, atol=1e-5)


@with_fsdp2
@pytest.mark.slow
def test_under_torchrun_the_first_process_shows_and_writes_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot, model = tmp_path / "plot.png", tmp_path / "model.pt"
    result = torchrun("-m", "torchclip", "train", *TINY, "--plot", plot, "--save", model)
    assert result.returncode == 0, result.stderr
    _, alone = run(capsys, "--save", tmp_path / "alone.pt")
    assert "on 2 processes with FSDP2" in " ".join(result.stdout.split())
    assert result.stdout.count("written by the clipped model") == 1
    for name in ("unclipped", "clipped"):
        assert row(result.stdout, name) == row(alone, name)
    assert imread(plot).std() > 0.01
    loaded, expected = (load_model(path)[0].state_dict() for path in (model, tmp_path / "alone.pt"))
    torch.testing.assert_close(loaded, expected)


@with_fsdp2
@pytest.mark.slow
def test_ctrl_c_on_one_process_ends_all_after_the_same_step() -> None:
    (first, output, first_errors), (second, nothing, second_errors) = on_two_ranks(
        "-c", INTERRUPTED, "train", *TINY
    )
    assert (first, second) == (130, 130), first_errors + second_errors
    assert [row(output, name)[1] for name in ("unclipped", "clipped")] == ["3 of 6", "3 of 6"]
    assert (nothing, first_errors, second_errors) == ("", "", "")


REFUSED = """
import sys
import torch
from torchclip.cli.main import main

version, *arguments = sys.argv[1:]
torch.__version__ = version or torch.__version__
main(["train", *arguments])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "--batch", "5"], "--batch 5 cannot be shared equally by 2 processes; pass a multiple of 2"),
        (["2.6.0+cpu"], "FSDP2 on the CPU needs torch 2.7, this is 2.6.0+cpu; pass --parallel ddp"),
    ],
)
def test_all_processes_refuse_and_one_says_why(arguments: list[str], message: str) -> None:
    (first, output, error), (second, *nothing) = on_two_ranks("-c", REFUSED, *arguments)
    assert (first, second) == (2, 2), error
    assert (output, nothing) == ("", ["", ""])
    assert error.startswith("torchclip train: error: ")
    assert error.endswith(f"{message}\n")
    assert error.count("\n") == 1


def test_a_process_that_cannot_join_others_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE is set, but this process cannot join others" in refusal(capsys)


def test_a_model_that_does_not_fit_into_memory(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--hidden", str(10**9)])
    assert "--hidden 1000000000 does not fit into memory" in capsys.readouterr().err


def test_one_process_has_no_way_to_choose(capsys: pytest.CaptureFixture[str]) -> None:
    assert "torchrun --nproc-per-node 2 -m torchclip train" in refusal(capsys, "--parallel", "ddp")
