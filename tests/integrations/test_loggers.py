"""What loggers get."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import torchclip
from torchclip.history import History, Record
from torchclip.integrations.loggers import DictLogger
from torchclip.integrations.tensorboard import ScalarLogger

# The frameworks' warnings depend on their versions and on the machine.
pytestmark = pytest.mark.filterwarnings("ignore")


def numbers(**values: Any) -> dict[str, float]:
    return {f"clip/{name}": value for name, value in values.items()}


def clip_three_steps(on_clip: Callable[[Record], object], **options: Any) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    torchclip.Clipper(optimizer, 2.0, on_clip=on_clip, **options)
    for norm in (1.0, 4.0, math.inf):
        weight.grad = torch.tensor([0.0, norm])
        optimizer.step()


def test_scalars_in_tensorboard(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path) as writer:
        clip_three_steps(ScalarLogger(writer, prefix="clipping"))
    events = EventAccumulator(str(tmp_path)).Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found["clipping/total_norm"] == [(0, 1.0), (1, 4.0), (2, math.inf)]
    assert found["clipping/clipped_norm"][:2] == [(0, 1.0), (1, pytest.approx(2.0))]
    assert found["clipping/max_norm"] == [(0, 2.0), (1, 2.0), (2, 2.0)]
    assert found["clipping/clipped_share"] == [(0, 0.0), (1, 0.5), (2, pytest.approx(2 / 3))]


def test_a_logger_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`log` must be callable, got 3 \(int\)"):
        DictLogger(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`writer` must be a SummaryWriter, got 3 \(int\)"):
        ScalarLogger(3)  # type: ignore[arg-type]


def test_loggers_go_on_from_a_history(tmp_path: Path) -> None:
    history = History()
    for step, coefficient in enumerate([0.5, 0.5, 1.0]):
        history.append(step, 4.0, 2.0, coefficient)
    logged: list[dict[str, float]] = []
    by_function = DictLogger(logged.append)
    by_function.resume(history)
    clip_three_steps(by_function)
    shares = [2 / 4, 3 / 5, 4 / 6]
    assert [entry["clip/clipped_share"] for entry in logged] == shares
    with SummaryWriter(tmp_path) as writer:
        to_tensorboard = ScalarLogger(writer)
        to_tensorboard.resume(history)
        clip_three_steps(to_tensorboard)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("clip/clipped_share")
    assert [event.value for event in events] == pytest.approx(shares)


def test_scalars_for_any_logger() -> None:
    logged: list[dict[str, float]] = []
    clip_three_steps(DictLogger(logged.append))
    assert logged[:2] == [
        numbers(total_norm=1.0, clipped_norm=1.0, max_norm=2.0, clipped_share=0.0),
        numbers(total_norm=4.0, clipped_norm=pytest.approx(2.0), max_norm=2.0, clipped_share=0.5),
    ]


def test_a_skipped_step_has_a_norm_of_0_after_clipping() -> None:
    logged: list[dict[str, float]] = []
    clip_three_steps(DictLogger(logged.append), nonfinite="skip")
    assert logged[2]["clip/clipped_norm"] == 0.0


def test_layers_are_logged_by_name_in_a_section_of_their_own(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    logged: list[dict[str, float]] = []
    with SummaryWriter(tmp_path) as writer:
        to_tensorboard, by_function = ScalarLogger(writer, prefix="grad"), DictLogger(logged.append)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

        def on_clip(record: Record) -> None:
            to_tensorboard(record)
            by_function(record)

        clipper = torchclip.Clipper(optimizer, 2.0, on_clip=on_clip, model=model, layers_every=2)
        for step in range(4):
            model[0].weight.grad, model[1].weight.grad = (
                torch.full((1, 1), step + 3.0),
                torch.full((1, 1), 4.0),
            )
            optimizer.step()
    assert clipper.history.layers.steps == [0, 2]
    layers = [{k: v for k, v in each.items() if k.startswith("clip_layers/")} for each in logged]
    names = ("0.weight", "0.bias", "1.weight", "1.bias")
    assert layers[0] == {f"clip_layers/{n}": v for n, v in zip(names, (3.0, 0.0, 4.0, 0.0), strict=True)}
    assert layers[2] == {f"clip_layers/{n}": v for n, v in zip(names, (5.0, 0.0, 4.0, 0.0), strict=True)}
    assert layers[1] == layers[3] == {}
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("grad_layers/0.weight")] == [(0, 3.0), (2, 5.0)]
