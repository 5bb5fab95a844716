"""``torchclip bench``: it measures what it says, and gives no ratio that is not certain."""

import json
import math
from pathlib import Path

import pytest
import torch

from torchclip.cli import bench
from torchclip.cli.main import main


def test_a_table_and_the_same_numbers_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench.MODELS, "mlp", bench.MODELS["mlp"]._replace(rounds=3))
    assert main(["bench", "--only", "mlp", "--json", str(tmp_path / "bench.json")]) == 0
    found = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    output = capsys.readouterr().out
    assert found["machine"]["torch"] == torch.__version__
    assert [row["what"] for row in found["rows"]] == [
        "one call, within the limit",
        "one call, clipping",
        "added to a step, clipping",
    ]
    for row in found["rows"]:
        assert (
            {"torch", "torchclip"}
            <= row["seconds"].keys()
            == row["times_less"].keys()
            == row["certain"].keys()
        )
        assert row["times_less"]["torch"] == 1.0
        assert f"MLP 17-64-64-6, {row['what']}" in output
    assert "Clipper" in found["rows"][-1]["seconds"]
    assert "measure again" in output


def test_a_full_disk_is_said_with_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write_text(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")  # without the file's name

    monkeypatch.setattr(Path, "write_text", write_text)
    monkeypatch.setattr(bench, "MODELS", {})
    file = tmp_path / "bench.json"
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--json", str(file)])
    error = f"torchclip bench: error: argument --json: No space left on device: {file}\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize("name", bench.MODELS)
def test_every_model_has_gradients(name: str) -> None:
    if name == "gpt2":
        with torch.device("meta"):
            model = bench.MODELS[name].make()
        assert sum(p.numel() for p in model.parameters()) == 124_439_808  # as published
        return
    setup = bench.Setup(name, torch.device("cpu"))
    assert all(parameter.grad is not None for parameter in setup.parameters)
    assert 0 < setup.norm < math.inf


@pytest.mark.parametrize("clips", [False, True])
def test_calls_clip_every_time_or_never(clips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    setup, called = bench.Setup("mlp", torch.device("cpu")), []

    def clip(parameters: list[torch.nn.Parameter], limit: float) -> None:
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        called.append(bool(norm > limit))

    monkeypatch.setattr("torchclip.clip_grad_norm_", clip)
    setup.rounds = 2
    bench.calls(setup, clips)
    assert set(called) == {clips}


def test_ratios_are_of_medians_above_the_floor_and_uncertain_ones_are_not_shown() -> None:
    def turns(*seconds: float) -> bench.Turn:
        return iter(seconds).__next__

    steady = {"torch": turns(5.0, 5.0, 90.0, 5.0), "torchclip": turns(3.0, 3.0, 3.0, 3.0)}
    row = bench.compared(steady, 4, floor=turns(1.0, 1.0, 1.0, 1.0))
    assert row["seconds"] == {"torch": 4.0, "torchclip": 2.0}
    assert row["times_less"]["torchclip"] == 2.0

    busy = {"torch": turns(5.0, 5.0, 5.0, 5.0), "torchclip": turns(1.0, 3.0, 1.0, 3.0)}
    row = bench.compared(busy, 4)
    assert row["certain"] == {"torch": True, "torchclip": False}


@pytest.mark.parametrize("device", ["meta", "cuda:99", "nonsense"])
def test_a_device_has_to_be_there(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--device", device])
    assert f"'{device}'" in capsys.readouterr().err
