"""The kernel's arithmetic compiles and works without Python."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="there is no compiler")
def test_it_works_without_python(tmp_path: Path) -> None:
    program = tmp_path / "arithmetic"
    options = ["-std=c++17", "-ffp-contract=off", f"-I{ROOT / 'torchclip' / 'csrc'}"]
    source = str(ROOT / "tests" / "csrc" / "arithmetic.cpp")
    subprocess.run([str(COMPILER), *options, source, "-o", str(program), "-ldl"], check=True, timeout=120)
    assert subprocess.run([str(program)], timeout=60).returncode == 0
