"""The code in README.md and on the pages of the documentation runs.

Every block that is fenced as ``python`` runs as it stands; one fenced as ``pycon`` is a session, whose
answers have to come out as printed.  Both start from ``PREAMBLE`` alone: no block needs another one to have
run before.  What a page shows besides, such as the output of a command, is fenced as one of ``NOT_PYTHON``.
"""

import doctest
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_PYTHON = {"console", "text"}
MEASURED_WITH = (2, 13)

PREAMBLE = """
import math
import sys
import types

import torch
from torch import nn

import torchclip

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
batches = [(torch.randn(16, 4), torch.randn(16, 1)) for _ in range(3)]
inputs, targets = batches[0]
loss_of = nn.functional.mse_loss
loss = loss_of(model(inputs), targets)
sys.modules["my_training_framework"] = types.ModuleType("my_training_framework")
"""

FENCED = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)


def blocks(page: Path) -> Iterator[tuple[str, str, int]]:
    """Each fenced block of a page: its language, its text, and the line that it begins in, from 0."""
    text = page.read_text(encoding="utf-8")
    for match in FENCED.finditer(text):
        yield match[1].strip(), match[2], text.count("\n", 0, match.start(2))


def run_page(page: Path) -> None:
    """Run every block of a page; the first that fails ends the process, and shows the page's own lines."""
    for language, code, line in blocks(page):
        names = {"__name__": "__main__"}
        exec(PREAMBLE, names)
        if language == "python":
            exec(compile("\n" * line + code, str(page), "exec"), names)
        elif language == "pycon":
            session = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line)
            options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
            if doctest.DocTestRunner(optionflags=options).run(session).failed:
                sys.exit(1)


def test_every_block_says_what_it_is() -> None:
    languages = {language for page in PAGES for language, _, _ in blocks(page)}
    assert {"python", "pycon"} <= languages <= {"python", "pycon", *NOT_PYTHON}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_code_runs(page: Path, tmp_path: Path) -> None:
    if page.name == "contract.md" and tuple(map(int, torch.__version__.split(".")[:2])) != MEASURED_WITH:
        pytest.skip("the page shows what torch 2.13 answers")
    # In a process of its own: pages install torchclip in torch's place, and attach clippers.
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, str(page)],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    run_page(Path(sys.argv[1]))
