"""The kernel where torch has no DLPack exchange table of its own: the package that adds one, or none."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchclip import kernel

pytestmark = pytest.mark.slow  # each starts a process

HIDE = "setattr(torch.Tensor, NAME, None)"
HIDE_BOTH = f"{HIDE}; sys.modules['torch_c_dlpack_ext'] = None"
OWN_TABLE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__") and "torch_c_dlpack_ext" not in sys.modules

PROGRAM = """
import builtins, importlib, json, sys, torch
NAME = builtins.NAME = "__dlpack_c_exchange_api__"
torch.table = getattr(torch.Tensor, NAME, None)
found = []
for folder, before in json.loads(sys.argv[1]):
    for name in [name for name in sys.modules if name.startswith(("torchclip", "torch_c_dlpack_ext"))]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    exec(before)
    import torchclip
    assert torchclip.get_total_norm([torch.tensor([3.0, 4.0])]) == 5
    from torchclip.cli.info import facts
    imported = "imported" if sys.modules.get("torch_c_dlpack_ext") else "not imported"
    found.append(f"{imported}: {facts()['CPU kernel']}")
print(json.dumps(found))
"""


def status(tmp_path: Path, *cases: tuple[str, str | None]) -> list[str]:
    """What ``torchclip info`` says in a new process, for one case after the other.

    A case is code that runs before torchclip is imported, and code in the place of the package's, or None.
    """
    with_folders = []
    for i, (before, package) in enumerate(cases):
        folder = tmp_path / str(i)
        folder.mkdir()
        if package is not None:
            (folder / "torch_c_dlpack_ext.py").write_text(package)
        with_folders.append((str(folder), before))
    path = os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, json.dumps(with_folders)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


LACKS = re.escape(f"off (torch {torch.__version__} has no DLPack exchange table")
FAILED = f"not imported: {LACKS}, and torch-c-dlpack-ext could not add it"
WITHOUT_TABLE: list[tuple[str, str | None, str]] = [
    (HIDE_BOTH, None, rf"not imported: {LACKS}; .* pip install 'torchclip\[kernel\]' .* adds it\)"),
    (
        HIDE,
        "raise OSError('undefined symbol:\\n  _ZN3c10')",
        rf"{FAILED}: OSError: undefined symbol: _ZN3c10\)",
    ),
    (HIDE, "import no_such_module", rf"{FAILED}: ModuleNotFoundError: No module named 'no_such_module'\)"),
    (HIDE, "raise ImportError('No matching build')", rf"{FAILED}: ImportError: No matching build\)"),
    (HIDE, "1 / 0", rf"{FAILED}: ZeroDivisionError: division by zero\)"),
    (HIDE, "", rf"imported: {LACKS}, and torch-c-dlpack-ext did not add it\)"),
]


def test_the_reason_says_what_adds_the_table_or_why_the_package_did_not(tmp_path: Path) -> None:
    found = status(tmp_path, *((before, package) for before, package, _ in WITHOUT_TABLE))
    for (*_, expected), line in zip(WITHOUT_TABLE, found, strict=True):
        assert re.fullmatch(expected, line), line


ADDS_IT = "import torch; setattr(torch.Tensor, NAME, torch.table)"
has_own_table = pytest.mark.skipif(not OWN_TABLE, reason="needs torch's own table")


@pytest.mark.skipif(not kernel.status().startswith("active"), reason="the kernel is off")
@pytest.mark.parametrize(
    ("before", "package", "expected"),
    [
        (HIDE, "import torch; setattr(torch.Tensor, NAME, 0)", r".*off \(torch .* does not fit"),
        ("del torch._C._increment_version", None, r".*off \(torch .* does not fit: .+"),
        ("sys.modules['torchclip._kernel'] = None", None, r".*off \(the extension was not built"),
        pytest.param("pass", ADDS_IT, "not imported: active", marks=has_own_table),
        pytest.param(HIDE, ADDS_IT, "imported: active", marks=has_own_table),
    ],
)
def test_a_table_is_looked_for_where_torch_has_none_and_must_fit(
    tmp_path: Path, before: str, package: str | None, expected: str
) -> None:
    (found,) = status(tmp_path, (before, package))
    assert re.match(expected, found), found
