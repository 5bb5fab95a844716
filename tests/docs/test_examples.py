"""The examples run as a user runs them, and clip."""

import base64
import copy
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from distributed_helpers import FSDP2, TORCHRUN, torchrun
from nbclient import NotebookClient
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
CLIPPED = r"^{} steps: [1-9]\d* clipped"
SAME_ON_RANKS = r"^norm of the last step on each rank: \[(\S+), \1\]\n50 steps: [1-9]\d* clipped"
WRONG_THEN_RIGHT = (
    r"^wrong: \[(\S+), (?!\1)(\S+), \1, \2\]\n"
    r'(?s:.*)norm1 = torchclip\.get_total_norm\(part1, group=mesh\["ep"\]\.get_group\(\)\)\n'
    r"(?s:.*)^right: \[(\S+), \3, \3, \3\]$"
)
EXPECTED = {
    "plain.py": CLIPPED.format(300),
    "amp.py": CLIPPED.format(100),
    "lightning_callback.py": CLIPPED.format(96),
    "transformers_trainer.py": CLIPPED.format(60),
    "lightning_two_optimizers.py": CLIPPED.format(16),
    "transformers_two_optimizers.py": CLIPPED.format(16),
    "torchtitan_optimizers.py": CLIPPED.format(20),
    "sb3_ppo.py": r"^mean reward trained: \d{3}$",
    "ignite_trainer.py": CLIPPED.format(96),
    "ddp.py": SAME_ON_RANKS,
    "fsdp2.py": SAME_ON_RANKS,
    "check_ranks.py": WRONG_THEN_RIGHT,
    "char_rnn.py": r"^step 300: loss 1\.\d\d$",
    "book.py": r"^  clip_grads +(norm 27\.253, .*)\n  clip_with_torchclip +\1$",
}
BETWEEN = "the next example\n"
IN_TURN = f"""
import runpy, sys
for i, path in enumerate(sys.argv[1:]):
    if i:
        print({BETWEEN!r}, end="")
    runpy.run_path(path, run_name="__main__")
"""
ON_RANKS = {"ddp.py": TORCHRUN, "fsdp2.py": TORCHRUN, "check_ranks.py": torchrun(4)}


def test_all_examples_are_here_and_short() -> None:
    assert EXPECTED.keys() == {path.name for path in EXAMPLES.glob("*.py")}
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 140


def programs() -> list[tuple[str, ...]]:
    """Those of one framework share a process, as its import takes long; ranks need processes of their own."""
    together: dict[str, tuple[str, ...]] = {}
    for name in EXPECTED:
        key = name if name in ON_RANKS else name.partition("_")[0]
        together[key] = (*together.get(key, ()), name)
    return list(together.values())


@pytest.mark.slow
@pytest.mark.parametrize("names", programs(), ids=" ".join)
def test_examples(names: tuple[str, ...], tmp_path: Path) -> None:
    if names == ("fsdp2.py",) and not FSDP2:
        pytest.skip("torch 2.6 has FSDP2 for accelerators only")
    if names == ("torchtitan_optimizers.py",):
        pytest.importorskip("torchtitan.components.optimizer")
    launcher = ON_RANKS.get(names[0], ("-c", IN_TURN) if len(names) > 1 else ())
    stdout = output_of(*launcher, *(str(EXAMPLES / name) for name in names), directory=tmp_path)
    for name, output in zip(names, stdout.split(BETWEEN), strict=True):
        assert re.search(EXPECTED[name], output, re.MULTILINE), output
    assert not list(tmp_path.iterdir())


def output_of(*command: str, directory: Path) -> str:
    """What Python prints with these arguments."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=directory,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    # torch 2.13 with gloo sometimes aborts while a process shuts down, also without torchclip: a thread that
    # frees a tensor of the last collective waits for Python, which has ended.  The output is complete then.
    aborted = "torchrun" in str(command) and "terminate called without an active exception" in done.stderr
    assert done.returncode == 0 or aborted, done.stderr
    # Before torch 2.10, gloo itself prints there how many ranks it has connected.
    return "".join(line for line in done.stdout.splitlines(keepends=True) if not line.startswith("[Gloo]"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp.py", "fsdp2.py"])
def test_ranks_have_the_numbers_of_one_process(name: str, tmp_path: Path) -> None:
    if name == "fsdp2.py" and not FSDP2:
        pytest.skip("torch 2.6 has FSDP2 for accelerators only")
    alone = [each if each != "--nproc-per-node=2" else "--nproc-per-node=1" for each in TORCHRUN]
    assert alone != [*TORCHRUN]
    outputs = [output_of(*each, str(EXAMPLES / name), directory=tmp_path) for each in (alone, TORCHRUN)]
    norms, summaries = zip(*(output.split("\n", 1) for output in outputs), strict=True)
    (one,), (first, second) = (re.findall(r"\d\.\d+", line) for line in norms)
    assert first == second
    assert float(first) == pytest.approx(float(one), rel=1e-4)
    numbers = [[float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)] for text in summaries]
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-3)


@pytest.mark.slow
def test_the_tour_s_outputs_are_those_of_the_code_and_it_runs_again(tmp_path: Path) -> None:
    tour = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    stored_text, stored_pictures = outputs(tour)
    assert len(nbformat.writes(tour)) < 300_000
    tour.cells = [copy.deepcopy(cell) for cell in tour.cells for _ in range(2)]
    NotebookClient(tour, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    first, second = (nbformat.from_dict({**tour, "cells": tour.cells[i::2]}) for i in range(2))
    for run in (first, second):
        text, pictures = outputs(run)
        # If this fails, the outputs in the repository are older than the code: tools/pictures runs it anew.
        assert without_numbers(text) == without_numbers(stored_text)
        assert len(pictures) == len(stored_pictures) == 3
        for picture, stored in zip(pictures, stored_pictures, strict=True):
            assert picture.size == pytest.approx(stored.size, rel=0.03)
            levels = [np.asarray(each.convert("L").resize(stored.size), float) for each in (picture, stored)]
            assert (abs(levels[0] - levels[1]) > 64).mean() < 0.02
    losses = {name: float(loss) for name, loss in re.findall(r"^(\w.*?) +loss of .* ([\d.]+)$", text, re.M)}
    assert losses.pop("large steps") > 3
    assert all(loss < 0.6 for loss in losses.values())
    assert len(losses) == 3


def outputs(notebook: Any) -> tuple[str, list[Image.Image]]:
    """What the cells printed, and the pictures that they drew."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    drawn = [output.data["image/png"] for output in found if "image/png" in output.get("data", {})]
    pictures: list[Image.Image] = [Image.open(io.BytesIO(base64.b64decode(each))) for each in drawn]
    printed = [output.text for output in found if output.output_type == "stream" and output.name == "stdout"]
    return "".join(printed), pictures


def without_numbers(text: str) -> str:
    return " ".join(re.sub(r"\d[\d.,]*(e[+-]?\d+)?", "0", text).split())
