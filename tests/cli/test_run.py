"""The command ``torchclip run``: a script runs as under python, and the report says what clipping did."""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import in_process
import numpy as np
import pytest
import torch

import torchclip
from torchclip.cli.main import main
from torchclip.cli.run.recording import recording
from torchclip.cli.run.steps import StepRecorder
from torchclip.cli.run.trial import Trial

run_here = in_process.run_here

SCRIPT = """
import sys
import torch
from torch.nn.utils import clip_grad_norm_

weight = torch.zeros(2, requires_grad=True)
optimizer = torch.optim.SGD([weight], lr=1.0)
for norm in (1.0, 2.0, 3.0, 4.0, 4.0):
    weight.grad = torch.tensor([0.0, norm])
    print(float(clip_grad_norm_([weight], 2.5)), float(weight.grad.norm()))
    optimizer.step()
"""


def run(
    tmp_path: Path,
    source: str,
    *arguments: str,
    options: Sequence[str] = (),
    launcher: Sequence[str] = ("-m", "torchclip", "run"),
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    (tmp_path / "script.py").write_text(textwrap.dedent(source), encoding="utf-8")
    command = [sys.executable, *launcher, *options, "script" if options else "script.py", *arguments]
    return subprocess.run(
        command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_the_report_tells_what_clipping_did(tmp_path: Path) -> None:
    done = run(tmp_path, SCRIPT)
    assert done.returncode == 0
    norms = np.array([line.split() for line in done.stdout.splitlines()], dtype=float)
    np.testing.assert_allclose(norms, [[1.0, 1.0], [2.0, 2.0], [3.0, 2.5], [4.0, 2.5], [4.0, 2.5]], rtol=1e-6)
    assert re.match(r"torchclip: report on a run of \S+ \S?s\n", done.stderr)
    assert "\noptimizer (SGD): clipped to 2.5 by clip_grad_norm_ at script.py:" in done.stderr
    assert "  5 steps: 3 clipped (60.0%), 0 non-finite, 0 skipped\n" in done.stderr


ENVIRONMENT = """
    import pickle, sys, __main__

    class Local:
        pass

    print(sys.argv, __file__, sys.path[0], __name__, __main__.__dict__ is globals(), __spec__ is None)
    print(type(pickle.loads(pickle.dumps(Local()))) is Local, sys.exc_info())
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("-m",)])
def test_the_script_finds_what_it_finds_under_python(tmp_path: Path, options: tuple[str, ...]) -> None:
    arguments = ["--help", "-m", "--", "x y", "--lr=3"]
    under_python = run(tmp_path, ENVIRONMENT, *arguments, options=options, launcher=())
    under_torchclip = run(tmp_path, ENVIRONMENT, *arguments, options=options)
    assert under_python.returncode == 0
    assert under_torchclip.stdout == under_python.stdout
    assert "No torch.optim.Optimizer took a step" in under_torchclip.stderr


REPORT = "torchclip: report on a run of .*\n  No torch.optim.Optimizer took a step.\n"


@pytest.mark.slow
def test_an_exit_with_a_message_is_as_under_python(tmp_path: Path) -> None:
    source = "import sys\nprint('begun')\nsys.exit('a message')\n"
    under_python, under_torchclip = run(tmp_path, source, launcher=()), run(tmp_path, source)
    assert under_torchclip.returncode == under_python.returncode == 1
    assert under_torchclip.stdout == under_python.stdout
    assert re.search(REPORT, under_torchclip.stderr)
    assert re.sub(REPORT, "", under_torchclip.stderr) == under_python.stderr


def test_a_traceback_is_as_under_python(run_here: in_process.Run, tmp_path: Path) -> None:
    source = "print('begun')\n[0][1]\n"
    under_python, under_torchclip = run(tmp_path, source, launcher=()), run_here(source)
    assert under_torchclip.returncode == under_python.returncode == 1
    assert under_torchclip.stdout == under_python.stdout
    found = re.sub(r"torchclip: report on a run of(.|\n)*", "", under_torchclip.stderr)
    assert found == under_python.stderr


def test_without_a_script_only_the_script_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run"])
    assert capsys.readouterr().err.endswith("required: SCRIPT\n")


@pytest.mark.parametrize("source", ["this is no Python", "x = 1\n  y = 2"])
def test_a_script_that_is_no_python_never_ran(run_here: in_process.Run, tmp_path: Path, source: str) -> None:
    under_python = run(tmp_path, source, launcher=())
    under_torchclip = run_here(source)
    assert (under_torchclip.returncode, under_torchclip.stdout) == (1, "")
    assert under_torchclip.stderr.splitlines()[-1] == under_python.stderr.splitlines()[-1]
    assert "torchclip" not in under_torchclip.stderr


def test_what_cannot_be_started_is_refused_without_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        """The message about a script, after the command's name."""
        with pytest.raises(SystemExit, match="2"):
            main(["run", *arguments])
        torchclip.uninstall()
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.count("\n") == 1
        return output.err.removeprefix("torchclip run: error: ")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["torchclip"])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    assert refused("nowhere.py") == "argument SCRIPT: No such file or directory: nowhere.py\n"
    assert refused("-m", "nowhere") == "argument SCRIPT: No module named nowhere\n"
    assert refused("package") == "argument SCRIPT: Is a directory: package\n"
    assert "argument SCRIPT: No module named package.__main__" in refused("-m", "package")


def test_a_missing_module_that_the_script_imports_is_the_scripts_error(run_here: in_process.Run) -> None:
    done = run_here("import nowhere", options=("-m",))
    assert done.returncode == 1
    assert "ModuleNotFoundError: No module named 'nowhere'" in done.stderr
    assert "torchclip: report on a run of" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("safe", "options"), [("-P", ()), ("-I", ("-m",)), ("PYTHONSAFEPATH", ())])
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no safe path")
def test_in_pythons_safe_mode_nothing_is_put_on_the_path(
    tmp_path: Path, safe: str, options: tuple[str, ...]
) -> None:
    show = "import json, sys; print(json.dumps(sys.path))"
    (tmp_path / "script.py").write_text(show)
    flags = [safe] if safe.startswith("-") else []
    environment = os.environ if flags else os.environ | {safe: "1"}
    # Installed packages are found without help; this checkout, and a module to run, may not be.
    added = [str(Path(torchclip.__file__).parents[1]), str(tmp_path)]
    arguments = ["run", *options, "script" if options else "script.py"]
    begin = f"import sys; sys.path += {added}; from torchclip.cli.main import main; main({arguments})"
    expected, found = (
        subprocess.run(
            [sys.executable, *flags, "-c", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            check=True,
        ).stdout
        for code in (show, begin)
    )
    assert _without_torchs(json.loads(found)) == json.loads(expected) + added


def _without_torchs(path: list[str]) -> list[str]:
    """Torch up to 2.9 puts a temporary directory for code that it generates on the path."""
    return [entry for entry in path if Path(entry).parent != Path(tempfile.gettempdir())]


# The recorder


@pytest.fixture
def recorder() -> Iterator[StepRecorder]:
    with recording(Trial()) as found:
        yield found
    torchclip.uninstall()
    assert torch.nn.utils.clip_grad_norm_.__module__.startswith("torch.")


def weights(seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    found = [torch.zeros(3, 4, requires_grad=True) for _ in range(3)]
    for weight in found:
        weight.grad = torch.randn(3, 4, generator=generator)
    return found


CALLS = {
    "clip_grad_norm_": lambda utils, w, i: utils.clip_grad_norm_(w, 0.5 * i, norm_type=1),
    "clip_grads_with_norm_": lambda utils, w, i: utils.clip_grads_with_norm_(w, 0.5 * i, 8.0),
    "clip_grad_value_": lambda utils, w, i: utils.clip_grad_value_(w, clip_value=0.1 * i),
    "get_total_norm": lambda utils, w, i: utils.get_total_norm([p.grad for p in w], "inf"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_recording_changes_no_number(recorder: StepRecorder, call: Callable[..., Any]) -> None:
    for i in range(100):
        recorded, expected = weights(i), weights(i)
        result, expected_result = call(torch.nn.utils, recorded, i), call(torchclip, expected, i)
        assert result is expected_result is None or torch.equal(result, expected_result)
        assert all(torch.equal(r.grad, e.grad) for r, e in zip(recorded, expected, strict=True))


def test_gradients_that_are_not_finite_stay_as_they_are(recorder: StepRecorder) -> None:
    for _ in range(50):
        weight = torch.zeros(3, requires_grad=True)
        weight.grad = torch.tensor([torch.inf, torch.nan, -0.0])
        torch.nn.utils.clip_grad_norm_(weight, torch.inf)
        torch.testing.assert_close(weight.grad, torch.tensor([torch.inf, torch.nan, -0.0]), equal_nan=True)


def test_bad_arguments_are_refused_as_without_the_recorder(recorder: StepRecorder) -> None:
    weight = weights()
    optimizer: Any = torch.optim.SGD(weight, lr=0.1)
    for _ in range(20):
        with pytest.raises(ValueError, match="max_norm"):
            torch.nn.utils.clip_grad_norm_(weight, -1.0)
        with pytest.raises(TypeError, match="optimizer"):
            torch.nn.utils.clip_grad_norm_(optimizer, 1.0)
    assert recorder.calls.number == 0


def test_the_programs_random_numbers_are_its_own(recorder: StepRecorder) -> None:
    torch.manual_seed(0)
    random.seed(0)
    expected = [torch.rand(()), random.random()]
    torch.manual_seed(0)
    random.seed(0)
    for _ in range(50):
        torch.nn.utils.clip_grad_norm_(weights(), 1.0)
    assert [torch.rand(()), random.random()] == expected


@pytest.mark.parametrize(
    ("trial", "left"), [(Trial(), [0.6, 0.8]), (Trial(max_norm=2.0), [3.0, 4.0])], ids=str
)
def test_compiled_code_stays_whole_and_in_a_trial_only_measures(trial: Trial, left: list[float]) -> None:
    def clip(weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_([weight], 1.0)

    weight = torch.zeros(2, requires_grad=True)
    weight.grad = torch.tensor([3.0, 4.0])
    with recording(trial) as recorder:
        assert torch.compile(clip, backend="aot_eager", fullgraph=True)(weight) == 5
    torchclip.uninstall()
    torch.testing.assert_close(weight.grad, torch.tensor(left))
    assert recorder.calls.number == 0
