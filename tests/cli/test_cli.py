"""The command line: which commands there are, what they refuse, and how they say so."""

import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import torchclip
from torchclip._core import native
from torchclip.cli.main import COMMANDS, main

MAIN = "from torchclip.cli.main import main; sys.exit(main(sys.argv[1:]))"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def test_module_runs_as_the_command_does() -> None:
    result = python("-m", "torchclip", "--version")
    assert (result.returncode, result.stdout) == (0, f"torchclip {torchclip.__version__}\n")


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    output = capsys.readouterr().out
    assert all(f"\n    {name} " in output for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"usage: torchclip {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["trian"], ["--nonsense"], ["info", "--nonsense"], ["bench", "extra"]])
def test_unknown_arguments_are_refused_in_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    errors = capsys.readouterr().err
    assert errors.startswith("torchclip")
    assert errors.count("\n") == 1
    assert arguments[-1] in errors


def test_info_shows_versions_and_threads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    facts = dict(re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines())
    assert facts["torchclip"] == torchclip.__version__
    assert facts["Python"] == platform.python_version()
    assert facts["torch"] == torch.__version__
    assert facts["numpy"] == np.__version__


@pytest.mark.parametrize(
    ("reason", "helps"),
    [
        ("off (the extension was not built: g++: not found)", True),
        ("off (TORCHCLIP_KERNEL=0)", False),
        ("off (torch 2.6 has no DLPack exchange table)", False),
    ],
)
def test_info_says_how_to_get_the_kernel_where_that_helps(
    reason: str, helps: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "extension", None)
    monkeypatch.setattr(native, "_reason", reason)
    assert main(["info"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert ("wheel" in last and "apt install g++" in last) == helps


def add_required(package: str, found: set[str]) -> None:
    """Adds a package, and what it requires without its extras."""
    if package in found:
        return
    found.add(package)
    for line in metadata.requires(package) or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            add_required(canonicalize_name(requirement.name), found)


@pytest.mark.slow
def test_info_needs_torch_and_numpy_alone() -> None:
    brought = {"torchclip"}
    add_required("torch", brought)
    add_required("numpy", brought)
    hidden = [
        module
        for module, packages in metadata.packages_distributions().items()
        if not brought.intersection(map(canonicalize_name, packages))
    ]
    assert {"rich", "matplotlib", "pytest"} <= {*hidden}
    hide = f"import sys; sys.modules.update(dict.fromkeys({hidden})); "
    result = python("-c", hide + MAIN, "info")
    assert result.returncode == 0, result.stderr
    assert "CPU kernel" in result.stdout


@pytest.mark.parametrize(("option", "package"), [("--plot", "matplotlib"), ("--html", "jinja2")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    option: str,
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", ["torchclip"])
    (tmp_path / "script.py").touch()
    with pytest.raises(SystemExit, match="2"):
        main(["run", option, str(tmp_path / "a.png"), str(tmp_path / "script.py")])
    assert capsys.readouterr().err == (
        f"torchclip run: error: argument {option}: needs {package}; "
        "install with: pip install 'torchclip[demo]' (from a checkout: pip install '.[demo]')\n"
    )


# What files options name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--csv", "{}/missing/a.csv"], "argument --csv: there is no directory"),
        (["--csv", "{}"], "argument --csv: {} is a directory"),
        (["--html", "{}/train.py"], "argument --html: must not be a Python file, got '{}/train.py'"),
        (["--csv", "{}/" + "a" * 300], "argument --csv: File name too long: {}"),
        (["--html", "{}/file/a.html"], "argument --html: there is no directory"),
        (["--plot", "{}/a.jpg"], "argument --plot: must end in .png, .svg or .pdf"),
        (
            ["--plot", "{0}/a.png", "--html", "{0}/../{1}/a.png"],
            "--plot, --csv and --html must name different",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_option(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["torchclip"])
    (tmp_path / "file").write_text("text")
    with pytest.raises(SystemExit, match="2"):
        main(["run", *(each.format(tmp_path, tmp_path.name) for each in [*arguments, "{}/file"])])
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith(f"torchclip run: error: {message.format(tmp_path)}")


# How it ends


def test_ctrl_c_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torchclip.cli.info.run", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "torchclip info: interrupted\n"


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "torchclip", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
