"""The command ``torchclip train``: what it learns, shows, writes and refuses."""

import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from torchclip import train
from torchclip.cli import main

TINY = ["--steps", "6", "--hidden", "8", "--batch", "4", "--bptt", "10"]
MODEL = {"cell": "rnn", "hidden": 8, "batch": 4, "bptt": 10, "seed": 0, "lr": 3.0, "max_norm": 0.5}


@pytest.fixture(autouse=True)
def one_thread(threads):
    """So small a model gains nothing from more, and on a busy machine they wait for each other."""
    torch.set_num_threads(1)


def run(capsys, *arguments):
    """The status and the output of the command, with tiny settings unless others are given."""
    status = main(["train", *TINY, *map(str, arguments)])
    return status, capsys.readouterr().out


def refusal(capsys, *arguments):
    """The one line with which the command refuses its arguments."""
    with pytest.raises(SystemExit, match="2"):
        main(["train", *TINY, *map(str, arguments)])
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("torchclip train: error: ")
    assert output.err.count("\n") == 1
    return output.err


def row(output, name):
    """The cells of a run's row in the closing table."""
    line = next(line for line in output.splitlines() if line.strip().startswith(f"{name} "))
    return re.split(r"\s{2,}", line.strip())


def trained(steps=6, only=None, **changes):
    """Finished runs on the default text."""
    text = train.read_text(None)
    options = train.Options(steps=steps, **{**MODEL, **changes})
    vocabulary = "".join(sorted(set(text)))
    runs = train.start_runs(only, vocabulary, options)
    train.advance(runs, train.encode(text, vocabulary), options)
    return runs


# What it learns


def test_clipping_decides_whether_the_model_learns():
    # The command's defaults, shortened to 150 of their 300 steps.
    unclipped, clipped = trained(steps=150, hidden=128, batch=32, bptt=64)
    perplexity = {
        run.name: math.exp(np.mean([s.loss for s in run.steps[-20:]])) for run in (unclipped, clipped)
    }
    assert perplexity["clipped"] < 12
    assert perplexity["unclipped"] > 10 * perplexity["clipped"]
    assert max(step.norm for step in unclipped.steps) > 100


def test_both_runs_start_from_the_same_weights_and_batches():
    unclipped, clipped = trained()
    assert unclipped.steps[0] == clipped.steps[0]
    assert unclipped.steps[-1] != clipped.steps[-1]


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_same_seed_same_numbers(cell):
    first, again, other = (trained(cell=cell, seed=seed) for seed in (1, 1, 2))
    assert [run.steps for run in first] == [run.steps for run in again]
    assert first[0].steps != other[0].steps


def test_a_run_alone_has_the_numbers_that_it_has_beside_the_other():
    assert trained(only="clipped")[0].steps == trained()[1].steps


def test_gradients_are_clipped_to_the_threshold():
    # One step of SGD moves the weights by lr times the clipped gradient.
    options = train.Options(steps=1, **{**MODEL, "lr": 1.0, "max_norm": 0.01})
    tokens = torch.arange(200) % 7
    (run,) = train.start_runs("clipped", "abcdefg", options)
    before = torch.cat([p.detach().flatten().clone() for p in run.model.parameters()])
    train.advance([run], tokens, options)
    after = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    assert run.steps[0].norm > 0.01
    assert (after - before).norm() == pytest.approx(0.01, rel=1e-3)


def test_targets_are_the_characters_after_the_inputs():
    options = train.Options(steps=9, **MODEL)
    tokens = torch.arange(4 * 25)
    pairs = list(train.batches(tokens, options))
    assert len(pairs) == 9
    for inputs, targets in pairs:
        assert inputs.shape == (4, 10)
        assert torch.equal(targets, inputs + 1)
    assert torch.equal(pairs[1][0], pairs[0][0] + 10)


# What it shows


def test_closing_table_has_both_runs(capsys):
    status, output = run(capsys)
    assert status == 0
    _, progress, loss, perplexity, norm, largest, share = row(output, "unclipped")
    assert (progress, share) == ("6 of 6", "–")
    assert float(perplexity) == pytest.approx(math.exp(float(loss)), rel=0.02)
    assert 0 < float(norm) <= float(largest)
    assert re.fullmatch(r"\d+%", row(output, "clipped")[-1])


def test_output_is_the_same_each_time_and_fits_80_columns(capsys):
    _, output = run(capsys, "--seed", 5)
    assert output == run(capsys, "--seed", 5)[1]
    assert output != run(capsys, "--seed", 6)[1]
    assert max(map(len, output.splitlines())) <= 80


def test_text_of_each_model_is_shown(capsys):
    _, output = run(capsys)
    assert "written by the unclipped model" in output
    assert "written by the clipped model" in output


@pytest.mark.parametrize(("only", "other"), [("clipped", "unclipped"), ("unclipped", "clipped")])
def test_only_one_run(only, other, capsys):
    _, output = run(capsys, "--only", only)
    assert row(output, only)[1] == "6 of 6"
    assert not re.search(rf"^ *{other} ", output, re.MULTILINE)
    assert f"written by the {other}" not in output


def test_a_loss_that_is_not_finite_ends_the_run_and_is_reported(tmp_path, capsys):
    status, output = run(capsys, "--lr", "3e38", "--plot", tmp_path / "plot.png")
    assert status == 0
    for name in ("unclipped", "clipped"):
        assert row(output, name)[1:4] in (["diverged at 2", loss, loss] for loss in ("nan", "inf"))
    assert "scores are not finite" in output


def test_ctrl_c_shows_what_there_is(tmp_path):
    # A real signal, in the middle of the clipped run's third step.
    interrupting = """
import os, signal, sys
import torchclip
from torchclip.cli import main

clip, calls = torchclip.clip_grad_norm_, 0

def clip_and_interrupt(*arguments):
    global calls
    calls += 1
    if calls == 6:
        os.kill(os.getpid(), signal.SIGINT)
    return clip(*arguments)

torchclip.clip_grad_norm_ = clip_and_interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""
    plot, model = tmp_path / "plot.png", tmp_path / "model.pt"
    files = ["--plot", str(plot), "--save", str(model)]
    result = subprocess.run(
        [sys.executable, "-c", interrupting, "train", *TINY, *files], capture_output=True, encoding="utf-8"
    )
    assert (result.returncode, result.stderr) == (130, "")
    assert row(result.stdout, "clipped")[1] == "2 of 6"
    assert "written by the clipped model" in result.stdout
    assert imread(plot).std() > 0.01
    train.load_model(model)


# What it writes


@pytest.mark.parametrize("only", [[], ["--only", "clipped"]])
def test_plot_is_a_picture_with_something_in_it(only, tmp_path, capsys):
    plot = tmp_path / "plot.png"
    _, output = run(capsys, "--plot", plot, *only)
    assert str(plot) in output
    picture = imread(plot)[..., :3]
    colours = {"vermilion": (0xD5, 0x5E, 0x00), "blue": (0x00, 0x72, 0xB2), "black": (0, 0, 0)}
    drawn = {
        name: (abs(picture - np.array(rgb) / 255) < 0.01).all(axis=-1).sum() > 50
        for name, rgb in colours.items()
    }
    assert drawn == {"vermilion": not only, "blue": True, "black": True}


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_saved_model_writes_the_same_text_when_loaded(cell, tmp_path, capsys):
    path = tmp_path / "model.pt"
    _, output = run(capsys, "--cell", cell, "--save", path)
    assert str(path) in output
    model, vocabulary = train.load_model(path)
    trained_model = trained(cell=cell, lr=train.LEARNING_RATES[cell], max_norm=train.MAX_NORMS[cell])[1].model
    written = [train.sample(m, vocabulary, length=50, seed=3) for m in (model, trained_model)]
    assert written[0] == written[1]
    assert len(written[0]) == 50


def test_text_is_read_from_a_file(tmp_path, capsys):
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
def test_text_that_cannot_be_used(content, message, tmp_path, capsys):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert message in refusal(capsys, "--text", path)


def test_the_shortest_text_that_can_be_used(tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("abcd" * 11, encoding="utf-8")
    assert run(capsys, "--text", path)[0] == 0


def test_python_without_its_documentation(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "pass a text with --text FILE" in refusal(capsys)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--max-norm", value) for value in ("-1", "0", "nan", "inf", "much")),
        *(("--lr", value) for value in ("-1", "0", "nan", "inf", "much")),
        *(
            (name, value)
            for name in ("--steps", "--hidden", "--batch", "--bptt")
            for value in ("0", "-3", "1.5")
        ),
        *(("--seed", value) for value in ("-1", str(2**63), "x")),
        ("--cell", "gru"),
        ("--only", "both"),
    ],
)
def test_bad_values(option, value, capsys):
    message = refusal(capsys, option, value)
    assert f"argument {option}: " in message
    assert value in message


@pytest.mark.parametrize("option", ["--plot", "--save"])
def test_files_that_cannot_be_written(option, tmp_path, capsys):
    (tmp_path / "directory.png").mkdir()
    assert "is a directory" in refusal(capsys, option, tmp_path / "directory.png")
    assert "there is no directory" in refusal(capsys, option, tmp_path / "missing" / "file.png")


def test_plot_must_be_a_png(tmp_path, capsys):
    assert "must end in .png" in refusal(capsys, "--plot", tmp_path / "plot.svg")
