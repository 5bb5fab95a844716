"""Frameworks are imported only where they are used, and named where they are missing."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # each starts a process


@pytest.mark.parametrize("framework", ["lightning", "transformers"])
def test_a_missing_framework_is_named_with_its_extra(framework: str) -> None:
    source = f"""
import sys
sys.modules[{framework!r}] = None  # as if it were not installed
import torchclip
import torchclip.integrations.{framework}
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert f"pip install 'torchclip[{framework}]'" in done.stderr.splitlines()[-1]


def test_torchclip_imports_no_framework() -> None:
    frameworks = ["lightning", "transformers", "accelerate", "stable_baselines3", "tensorboard"]
    source = f"import sys, torchclip; print([name for name in {frameworks} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", source], capture_output=True, text=True).stdout == "[]\n"
