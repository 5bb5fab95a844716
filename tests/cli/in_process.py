"""The command ``torchclip run`` in this process, as another one would take seconds to import torch."""

import gc
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

import torchclip
from torchclip.cli.main import main

Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """A function that writes a script into the test's directory and runs it there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["torchclip"])
    monkeypatch.setattr(sys, "path", ["where torchclip is", *sys.path])
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)  # torch.distributed leaves one of its own
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])

    def run(source: str, *arguments: str, options: Sequence[str] = ()) -> CompletedProcess[str]:
        (tmp_path / "script.py").write_text(textwrap.dedent(source), encoding="utf-8")
        command = ["run", *options, "script" if "-m" in options else "script.py", *arguments]
        capfd.readouterr()
        gc.collect()  # a new process has no optimizers that earlier tests have left behind
        status: Any
        try:
            status = main(command)
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        finally:
            torchclip.uninstall()
        return CompletedProcess(command, status, *capfd.readouterr())

    return run
