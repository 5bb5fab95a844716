"""The kernel where torch has no DLPack exchange table of its own: the package that adds one, or none."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchclip import kernel

pytestmark = pytest.mark.slow  # each starts a process

HIDDEN = "table = getattr(torch.Tensor, NAME, None); setattr(torch.Tensor, NAME, None)"
OWN_TABLE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__") and "torch_c_dlpack_ext" not in sys.modules
LACKS = re.escape(f"off (torch {torch.__version__} has no DLPack exchange table")


def status(tmp_path: Path, before: str, package: str | None = None) -> str:
    """What ``torchclip info`` says in a process where a package of that name does this when imported."""
    if package is not None:
        (tmp_path / "torch_c_dlpack_ext.py").write_text(package)
    source = f"""
import builtins, sys, torch
NAME = builtins.NAME = "__dlpack_c_exchange_api__"
{before}
import torchclip
assert torchclip.get_total_norm([torch.tensor([3.0, 4.0])]) == 5
print("imported" if sys.modules.get("torch_c_dlpack_ext") else "not imported")
from torchclip.cli.info import facts
print(facts()["CPU kernel"])
"""
    path = os.pathsep.join(filter(None, [str(tmp_path), *sys.path, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_the_package_the_reason_says_what_adds_the_table(tmp_path: Path) -> None:
    found = status(tmp_path, f"{HIDDEN}; sys.modules['torch_c_dlpack_ext'] = None")
    assert re.fullmatch(rf"not imported\n{LACKS}; .* pip install 'torchclip\[kernel\]' .* adds it\)\n", found)


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        ("raise OSError('undefined symbol:\\n  _ZN3c10')", "OSError: undefined symbol: _ZN3c10"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise ImportError('No matching build')", "ImportError: No matching build"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_whatever_goes_wrong_in_the_package_is_a_reason(tmp_path: Path, package: str, reason: str) -> None:
    found = status(tmp_path, HIDDEN, package)
    assert re.fullmatch(
        rf"not imported\n{LACKS}, and torch-c-dlpack-ext could not add it: {re.escape(reason)}\)\n", found
    )


def test_a_package_that_adds_nothing_is_a_reason(tmp_path: Path) -> None:
    found = status(tmp_path, HIDDEN, "")
    assert re.fullmatch(rf"imported\n{LACKS}, and torch-c-dlpack-ext did not add it\)\n", found)


def test_a_table_that_does_not_fit_is_a_reason(tmp_path: Path) -> None:
    found = status(tmp_path, HIDDEN, "import torch; setattr(torch.Tensor, NAME, 0)")
    assert re.match(r"imported\noff \((torch .* does not fit|the extension was not built)", found)


@pytest.mark.skipif(not kernel.status().startswith("active"), reason="the kernel is off")
@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("del torch._C._increment_version", "torch .* does not fit: .+"),
        ("sys.modules['torchclip._kernel'] = None", "the extension was not built.*"),
    ],
)
def test_what_does_not_fit_turns_the_kernel_off(tmp_path: Path, before: str, reason: str) -> None:
    assert re.search(rf"\noff \({reason}\)\n$", status(tmp_path, before))


@pytest.mark.skipif(
    not OWN_TABLE or not kernel.status().startswith("active"), reason="needs torch's own table"
)
@pytest.mark.parametrize(("before", "expected"), [("", "not imported"), (HIDDEN, "imported")])
def test_the_package_is_imported_only_where_torch_has_no_table(
    tmp_path: Path, before: str, expected: str
) -> None:
    package = "import torch; setattr(torch.Tensor, NAME, torch.table)"
    found = status(tmp_path, f"{before or 'table = None'}; torch.table = table", package)
    assert re.match(rf"{expected}\nactive", found)
