"""``torchclip bench``: workloads are the models', ratios are what they say, the files are written."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from torchclip.cli import main as cli
from torchclip.cli.bench import contenders, figure, loop, rules, table, timing
from torchclip.cli.bench.contenders import OPERATIONS, Gradients
from torchclip.cli.bench.workloads import SCALING, WORKLOADS, Workload

SMALL = Workload("small", [(3, 3), (5,), ()])
SHORT = timing.Effort(sample_seconds=0.0, row_seconds=0.0, rounds=(3, 3))


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("two-3x3", 2, 18),
        ("ppo", 13, 8_963),
        ("rnnlm", 6, 281_400),
        ("1000x64", 1_000, 64_000),
        ("resnet50", 161, 25_557_032),
        ("gpt2", 148, 124_439_808),
        ("gpt2-bfloat16", 148, 124_439_808),
    ],
)
def test_workloads_have_the_sizes_of_the_models(name: str, tensors: int, elements: int) -> None:
    assert len(WORKLOADS[name].shapes) == tensors
    assert WORKLOADS[name].elements == elements


def test_bytes_follow_the_dtype() -> None:
    assert WORKLOADS["gpt2"].bytes == 4 * 124_439_808
    assert WORKLOADS["gpt2-bfloat16"].bytes == 2 * 124_439_808


def test_the_series_span_what_they_promise() -> None:
    many = [w for w in SCALING.values() if len(w.shapes) > 1]
    large = [w for w in SCALING.values() if len(w.shapes) == 1]
    assert [len(w.shapes) for w in many] == [10, 100, 1_000, 10_000, 100_000]
    assert (large[0].bytes, large[-1].bytes) == (2**10, 2**31)


def test_shapes_are_those_of_the_modules() -> None:
    lstm = torch.nn.LSTM(100, 100, bias=True)
    of_lstm = sum(p.numel() for p in lstm.parameters()) - 400  # unlike the book, torch has a second bias
    embedding, affine = 1000 * 100, 100 * 1000 + 1000
    assert WORKLOADS["rnnlm"].elements == embedding + of_lstm + affine


def test_gradients_are_restored_bit_for_bit() -> None:
    gradients = Gradients(SMALL)
    before = [tensor.clone() for tensor in gradients.tensors]
    torch.nn.utils.clip_grad_value_(gradients.parameters, 0.01)
    gradients.restore()
    assert all(torch.equal(a, b) for a, b in zip(gradients.tensors, before, strict=True))


def test_the_exact_norm_is_that_of_numpy() -> None:
    gradients = Gradients(SMALL)
    everything = np.concatenate([tensor.double().numpy().ravel() for tensor in gradients.tensors])
    assert gradients.norm == pytest.approx(np.linalg.norm(everything), rel=1e-14)


@pytest.mark.parametrize("name", ["torch", "kernel off", "torchclip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_call_clips_and_nothing_loses_its_digits(name: str, dtype: torch.dtype) -> None:
    gradients = Gradients(Workload("small", [(64,), (64,)], dtype))
    found = contenders.contenders(gradients, rivals=[])
    if name not in found:
        pytest.skip("the kernel is not built")
    numbers = timing.second_arguments("clipping", gradients.norm)
    clip, parameters = found[name].calls["clipping"]
    for max_norm in numbers:
        norm = clip(parameters, max_norm)
        # torch multiplies in any case; its bfloat16 norm has three digits.
        assert norm > max_norm or name == "torch"
    smallest = min(float(t[t != 0].abs().min()) for t in gradients.tensors)
    assert smallest > 1e4 * torch.finfo(dtype).tiny


def test_no_call_clips_where_it_is_not_needed() -> None:
    gradients = Gradients(SMALL)
    numbers = timing.second_arguments("no clipping", gradients.norm)
    torch.nn.utils.clip_grad_norm_(gradients.parameters, min(numbers))
    assert all(torch.equal(a, b) for a, b in zip(gradients.tensors, gradients.originals(), strict=True))


def test_a_timer_calls_as_often_as_it_says_and_restores_first() -> None:
    events: list[object] = []

    def function(gradients: object, number: float) -> None:
        events.append(number)

    contender = contenders.Contender({"clipping": (function, None)}, restore=lambda: events.append("restore"))
    timer = timing.Timer(contender, "clipping", numbers=[float(i) for i in range(10)])
    timer.calls = 3
    assert timer.sample() > 0
    assert events == ["restore", 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_ratios_are_taken_within_a_round() -> None:
    summary = timing.summary(times=[1.0, 10.0, 2.0], torch=[2.0, 30.0, 8.0], floor=[0.5, 2.5, 1.5])
    assert summary["seconds"] == [1.5, 2.0, 6.0]
    assert summary["speedup"] == [2.5, 3.0, 3.5]
    assert summary["floor_share"] == [0.375, 0.5, 0.625]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_row_has_every_contender_with_its_error(operation: str) -> None:
    gradients = Gradients(SMALL)
    row = timing.compare(gradients, operation, contenders.contenders(gradients, rivals=[]), SHORT)
    assert row["rounds"] == 3
    assert {"torch", "torchclip"} <= row["contenders"].keys()
    for result in row["contenders"].values():
        first, median, third = result["seconds"]
        assert 0 < first <= median <= third
        error = result["norm_error"]
        assert error is None if operation == "value" else error < 1e-6
    assert row["contenders"]["torch"]["speedup"] == [1.0, 1.0, 1.0]


def test_a_compiler_that_fails_is_reported() -> None:
    def function(gradients: object, number: float) -> None:
        raise RuntimeError("no compiler found\nand more")

    gradients = Gradients(SMALL)
    broken = contenders.Contender({"norm": (function, None)}, restore=lambda: None)
    found = contenders.contenders(gradients, rivals=[]) | {"torch.compile": broken}
    row = timing.compare(gradients, "norm", found, SHORT)
    assert row["contenders"]["torch.compile"] == {"failed": "RuntimeError: no compiler found"}
    named = {"workload": "small", "title": "small", "operation": "norm", "bytes": 72, **row}
    tables = list(table.call_tables([named | {"tensors": 3, "elements": 15}]))
    assert "failed" in tables[0].rows[0]
    expected = "torch.compile failed on small, get_total_norm: RuntimeError: no compiler found"
    assert expected in table.notes([], [named], tables)


def test_our_own_failure_is_not_a_result() -> None:
    def function(gradients: object, number: float) -> None:
        raise RuntimeError("a bug")

    gradients = Gradients(SMALL)
    broken = contenders.Contender({"norm": (function, None)}, restore=lambda: None)
    found = contenders.contenders(gradients, rivals=[]) | {"torchclip": broken}
    with pytest.raises(RuntimeError, match="a bug"):
        timing.compare(gradients, "norm", found, SHORT)


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_its_files(tmp_path: Path) -> None:
    results, picture = tmp_path / "results.json", tmp_path / "results.png"
    command = [sys.executable, "-m", "torchclip", "bench", "--quick", "--only", "two-3x3"]
    done = subprocess.run(
        [*command, "--json", str(results), "--plot", str(picture)], capture_output=True, text=True, check=True
    )
    for expected in [
        "two 3×3",
        "2 tensors, 18 elements",
        "torch threads",
        "CPU kernel",
        *OPERATIONS.values(),
    ]:
        assert expected in done.stdout
    report = json.loads(results.read_text())
    assert report["quick"] is True
    assert report["machine"]["torch"] == torch.__version__
    assert [row["operation"] for row in report["rows"]] == list(OPERATIONS)
    assert {"workload", "title", "tensors", "elements", "bytes", "floor_seconds"} <= report["rows"][0].keys()
    assert imread(picture).std() > 0.05


@pytest.mark.parametrize("device", ["cuda:99", "nowhere", "meta"])
def test_a_device_has_to_be_there(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "--device", device])
    error = capsys.readouterr().err
    assert "--device" in error
    assert device in error


def test_only_and_scaling_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "--scaling", "--only", "ppo"])
    assert "--only and --scaling" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_refused_before_measuring(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", option, str(tmp_path / "missing" / "file.png")])
    assert "there is no directory" in capsys.readouterr().err


def result(seconds: float, torch_seconds: float = 1.0, floor: float = 0.5) -> dict[str, Any]:
    return timing.summary([seconds] * 2, [torch_seconds] * 2, [floor] * 2) | {"norm_error": None}


def row(name: str, workload: Workload, operation: str, **seconds: float) -> timing.Row:
    return {
        "workload": name,
        "title": workload.title,
        "operation": operation,
        "tensors": len(workload.shapes),
        "elements": workload.elements,
        "bytes": workload.bytes,
        "floor_seconds": [0.5, 0.5, 0.5],
        "contenders": {name.replace("_", " "): result(value) for name, value in seconds.items()},
    }


def step_row(model: str, optimizer: str, clips: bool) -> dict[str, Any]:
    names = list(loop.CONTENDERS)[1:]
    added = {name: 1e-6 * (i + 1) for i, name in enumerate(names)}
    return {
        "model": model,
        "title": loop.TITLES[model],
        "optimizer": optimizer,
        "clips": clips,
        "added": added,
        "drift": dict.fromkeys(names, 0.0),
        "speedup": loop.speedups(added),
    }


STEP_ROWS = [
    step_row(model, optimizer, clips)
    for model in loop.MODELS
    for optimizer in loop.OPTIMIZERS
    for clips in (False, True)
]


def _of_clipper(row: dict[str, Any]) -> str:
    """The table's cell of a Clipper."""
    return next(table.step_tables([row])).rows[0][-1]


@pytest.mark.parametrize("width", [40, 60, 80, 140])
def test_the_tables_are_whole_at_any_width(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    times = {"torch": 4e-5, "optax": 2e-5, "kernel_off": 3e-5, "torchclip": 2e-6}
    rows = [row("ppo", WORKLOADS["ppo"], op, **times) for op in OPERATIONS]
    tables = [*table.step_tables(STEP_ROWS), *table.call_tables(rows), table.in_short(STEP_ROWS, rows)]
    for each in tables:
        table.show(each, Console(width=width))
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= width
    assert "…" not in output
    for title in (t.title for t in tables):
        assert title in " ".join(output.split())
    for expected in ("optax", "kernel off", "Clipper", "2 µs"):
        assert expected in output


def test_four_rows_say_it_in_short() -> None:
    rows = [row(n, WORKLOADS[n], op, torch=1.0, torchclip=0.4) for n in WORKLOADS for op in OPERATIONS]
    short = table.in_short(STEP_ROWS, rows)
    assert len(short.rows) == 4
    assert {len(cells) for cells in short.rows} == {len(short.columns)}
    assert short.rows[-1] == ["one call, GPT-2 small", "1 s", "400 ms", "2.5×"]
    assert table.markdown(short).count("\n") == 5
    assert table.in_short([], []).rows == []


def test_a_busy_machine_gives_no_ratio() -> None:
    calm, busy = step_row("mlp", "Adam", True), step_row("mlp", "Adam", True)
    busy["added"]["no clipping again"] = 0.3 * busy["added"]["Clipper"]
    cells = [_of_clipper(each) for each in (calm, busy)]
    assert re.fullmatch(r"[\d.]+ \([\d.]+×\)", cells[0])
    assert re.fullmatch(r"[\d.]+ \(busy\)", cells[1])
    for drawn, expected in ((calm, "×"), (busy, "busy")):
        (axes,) = figure.benchmark_figure([], OPERATIONS, [drawn]).axes
        assert expected in axes.texts[-1].get_text()

    calm["drift"]["Clipper"] = 0.3 * calm["added"]["Clipper"]
    assert "busy" in _of_clipper(calm)

    calls = row("ppo", WORKLOADS["ppo"], "clipping", torch=1.0, torchclip=0.1)
    assert next(table.call_tables([calls])).rows[0][-1] == "100 ms (10.0×)"
    calls["contenders"]["torchclip"]["speedup"] = [7.0, 10.0, 12.5]
    tables = list(table.call_tables([calls]))
    assert tables[0].rows[0][-1] == "100 ms (busy)"
    assert any("idle machine" in note for note in table.notes([], [calls], tables))
    assert not any("idle machine" in note for note in table.notes([calm], [], []))


def test_the_scaling_figure_is_not_blank(tmp_path: Path) -> None:
    rows = [row(n, w, op, torch=1.0, torchclip=0.5) for n, w in SCALING.items() for op in OPERATIONS]
    figure.scaling_figure(rows).savefig(tmp_path / "scaling.png")
    assert imread(tmp_path / "scaling.png").std() > 0.05


CHECKS = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "check_targets.py"))


def test_targets_are_compared_with_what_was_measured() -> None:
    ppo = WORKLOADS["ppo"]
    fast = row("ppo", ppo, "clipping", torch=1.0, optax=0.2, kernel_off=1.45, torchclip=0.05)
    slow = row("ppo", ppo, "clipping", torch=1.0, optax=0.2, kernel_off=1.55, torchclip=0.25)
    assert [check.met for check in CHECKS["checks"]([fast])] == [True, True, True]
    assert [check.met for check in CHECKS["checks"]([slow])] == [False, False, False]


def test_every_workload_has_its_targets() -> None:
    assert CHECKS["TARGETS"]["speedup"].keys() == WORKLOADS.keys()


def test_costs_that_grow_are_seen() -> None:
    def series(cost: float) -> list[timing.Row]:
        return [row(n, w, "norm", torchclip=cost * len(w.shapes)) for n, w in SCALING.items()]

    flat = series(0.1)
    assert all(check.met for check in CHECKS["checks"](flat))
    flat[4]["contenders"]["torchclip"] = result(0.2 * 100_000)
    assert [check.met for check in CHECKS["checks"](flat)] == [False, True]


# In training steps


def test_every_model_and_optimizer_is_measured_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "WARM_UP", 1)
    rows = loop.measure_steps(rounds=4)
    assert [(r["model"], r["optimizer"], r["clips"]) for r in rows] == [
        (r["model"], r["optimizer"], r["clips"]) for r in STEP_ROWS
    ]
    for row in rows:
        assert row["added"].keys() == set(loop.CONTENDERS) - {"no clipping"}
        assert set(figure.IN_STEPS) <= row["speedup"].keys()
        assert set(table.PARAMETERS) | set(table.LISTS) <= row["added"].keys()


def test_steps_come_first_in_the_picture_and_each_panel_has_its_scale() -> None:
    times = {"torch": 4e-5, "optax": 2e-5, "kernel_off": 3e-5, "torchclip": 2e-6}
    rows = [row(n, WORKLOADS[n], op, **times) for n in ("ppo", "gpt2") for op in OPERATIONS]
    drawn = figure.benchmark_figure(rows, OPERATIONS, STEP_ROWS)
    first, *panels = drawn.axes
    assert "In a training step" in first.figure.get_suptitle()
    assert len(first.patches) == len(figure.IN_STEPS) * len(STEP_ROWS)
    assert [axes.get_title() for axes in panels] == list(OPERATIONS.values())
    panels[0].set_xlim(1, 1e6)
    assert panels[1].get_xlim() != panels[0].get_xlim()
    assert first.get_xlim() != panels[1].get_xlim()


def test_steps_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torchclip.cli.bench.command.measure_steps", lambda rounds: STEP_ROWS)
    results, picture = tmp_path / "results.json", tmp_path / "results.png"
    files = ["--json", str(results), "--plot", str(picture)]
    assert cli.main(["bench", "--only", "steps", *files]) == 0
    report = json.loads(results.read_text())
    assert (report["rows"], report["steps"]) == ([], STEP_ROWS)
    assert imread(picture).std() > 0.05
    output = capsys.readouterr().out
    assert "µs added to a training step" in output
    assert "In short" in output
    assert not any(line.endswith(" ") for line in output.splitlines())


def test_the_other_rules_are_measured_beside_plain_loops() -> None:
    (model, *_) = rules.MODELS
    rows = rules.measure_rules(seconds=0, models=[model])
    assert [(row["rule"], row["model"]) for row in rows] == [(rule, model) for rule in rules.RULES]
    for row in rows:
        assert {rules.PLAIN, "torchclip"} <= row["seconds"].keys()
        assert row["speedup"]["torchclip"] > 0
    shown = table.rule_table(rows)
    assert shown.columns[1] == rules.PLAIN
    assert shown.columns[-1] == "torchclip"
    assert all(len(cells) == len(shown.columns) for cells in shown.rows)


@pytest.mark.parametrize("rule", rules.RULES)
def test_plain_loops_do_what_torchclip_does(rule: str) -> None:
    shapes, examples = next(iter(rules.MODELS.values()))
    results = []
    for call in rules._contenders(rule).values():
        setup = rules.Setup(shapes, examples)
        given = call(setup)
        grads: Any = [parameter.grad for parameter in setup.parameters]
        if isinstance(given, tuple):  # torchclip's sums, with their number
            grads = given[0]
        elif rule == "per example":  # Opacus puts them on the parameters
            grads = given or [vars(parameter)["summed_grad"] for parameter in setup.parameters]
        results.append(grads)
    for other in results[1:]:
        for ours, plain in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
