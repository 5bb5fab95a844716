"""``torchclip bench``: it measures what it says, and gives no ratio that is not certain."""

import math
import re

import pytest
import torch

from torchclip.cli import bench
from torchclip.cli.main import main


def test_a_table_has_a_row_for_each_way_of_clipping(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench.MODELS, "mlp", bench.MODELS["mlp"]._replace(rounds=3))
    assert main(["bench", "--only", "mlp"]) == 0
    output = capsys.readouterr().out
    assert f"torch              {torch.__version__}\n" in output
    time, ratio = r"\s+-?[\d,.]+", r" \((\?|-?[\d.]+×)\)"
    call, step = time + time + ratio, time + time + ratio + time + ratio
    rows = {"one call, within the limit": call, "one call, clipping": call, "added to a step, clipping": step}
    for what, cells in rows.items():
        assert re.search(rf"^MLP 17-64-64-6, {what}{cells}$", output, re.MULTILINE), output
    assert "measure again" in output


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
    found = bench.compared(steady, 4, floor=turns(1.0, 1.0, 1.0, 1.0))
    assert {name: each[:2] for name, each in found.items()} == {"torch": (4.0, 1.0), "torchclip": (2.0, 2.0)}

    busy = {"torch": turns(5.0, 5.0, 5.0, 5.0), "torchclip": turns(1.0, 3.0, 1.0, 3.0)}
    found = bench.compared(busy, 4)
    assert [each.is_certain for each in found.values()] == [True, False]


@pytest.mark.parametrize("device", ["meta", "cuda:99", "nonsense"])
def test_a_device_has_to_be_there(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--device", device])
    assert f"'{device}'" in capsys.readouterr().err
