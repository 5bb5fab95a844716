"""How far steps move each parameter, compared with its norm; and where a backward pass broke."""

import csv
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from clipper_helpers import INF
from helpers import interrupted_sgd
from torch import nn

from torchclip import Clipper
from torchclip.clipper.updates import WeightsBefore
from torchclip.history import History
from torchclip.history.layers import Layers


def model_of_two(weight: Any = (3.0, 4.0), bias: Any = (0.0, 0.0)) -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor(weight))
    model.bias = nn.Parameter(torch.tensor(bias))
    return model


def step_of(model: nn.Module, *optimizers: torch.optim.Optimizer, grad: float = 1.0) -> None:
    for p in model.parameters():
        p.grad = torch.tensor([0.6, 0.8]) * grad
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.usefixtures("everywhere")
def test_the_updates_of_sampled_steps() -> None:
    model = model_of_two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    clipper = Clipper(optimizer, INF, model=model, layers_every=2, updates=True)
    for _ in range(3):
        step_of(model, optimizer)
    updates = clipper.history.layers.updates
    assert [each.step for each in updates["weight"]] == [0, 2]
    assert [tuple(each) for each in updates["weight"]] == [
        (0, *map(pytest.approx, (5.0, 0.5, 0.1))),
        (2, *map(pytest.approx, (4.0, 0.5, 0.125))),
    ]
    assert [tuple(each) for each in updates["bias"]] == [
        (0, 0.0, pytest.approx(0.5), INF),
        (2, *map(pytest.approx, (1.0, 0.5, 0.5))),
    ]


def test_each_optimizer_of_a_round_has_its_updates_and_skipped_steps_have_none() -> None:
    model = model_of_two(bias=(3.0, 4.0))
    first, second = (
        torch.optim.SGD([p], lr=lr) for p, lr in zip(model.parameters(), (0.5, 1.0), strict=True)
    )
    clipper = Clipper([first, second], INF, model=model, layers_every=1, updates=True, skip_above=5.0)
    step_of(model, first, second)
    step_of(model, first, second, grad=50.0)
    step_of(model, first)
    second.step()  # ends the round
    updates = clipper.history.layers.updates
    assert {name: [(u.step, round(u.update, 4)) for u in each] for name, each in updates.items()} == {
        "weight": [(0, 0.5), (2, 0.5)],
        "bias": [(0, 1.0), (2, 1.0)],
    }


def test_a_failed_step_leaves_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of_two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    clipper = Clipper(optimizer, INF, model=model, layers_every=1, updates=True)
    made: list[WeightsBefore] = []
    initialize = WeightsBefore.__init__

    def noted(self: WeightsBefore, step: Any) -> None:
        made.append(self)
        initialize(self, step)

    monkeypatch.setattr(WeightsBefore, "__init__", noted)
    with interrupted_sgd():
        step_of(model, optimizer)
    clipper.norms()  # finds that the step has failed
    assert [len(each._copies) for each in made] == [0]
    with torch.no_grad():
        next(model.parameters()).mul_(2.0)
    step_of(model, optimizer)
    (update,) = clipper.history.layers.updates["weight"]
    assert tuple(update) == (0, *map(pytest.approx, (10.0, 0.5, 0.05)))
    assert [len(each._copies) for each in made] == [0, 0]


def test_updates_need_samples() -> None:
    optimizer = torch.optim.SGD(model_of_two().parameters(), lr=0.5)
    with pytest.raises(ValueError, match=r"`updates` .* pass `layers_every`"):
        Clipper(optimizer, 1.0, updates=True)
    with pytest.raises(TypeError, match="`updates`"):
        Clipper(optimizer, 1.0, layers_every=1, updates="yes")  # type: ignore[arg-type]


def history_with_updates() -> History:
    model = model_of_two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    clipper = Clipper(optimizer, INF, model=model, layers_every=10, updates=True)
    for _ in range(30):
        step_of(model, optimizer)
    return clipper.history


def test_updates_are_saved_pickled_and_thinned() -> None:
    history = history_with_updates()
    updates = history.layers.updates
    for loaded in (History(), pickle.loads(pickle.dumps(history))):
        loaded.load_state_dict(json.loads(json.dumps(history.state_dict())))
        assert loaded.layers.updates == updates
    few = Layers(maxlen=2)
    for step in range(5):
        few.append(step, ["a"], [1.0], [(["a"], [2.0], [float(step)])])
    assert few.steps == [each.step for each in few.updates["a"]] == [0, 4]
    state = history.state_dict()
    state["layers"]["updates"][0].append(1.0)
    with pytest.raises(ValueError, match=r"`state\['layers'\]\['updates'\]"):
        History().load_state_dict(state)


def test_updates_in_the_table_the_picture_and_the_page(tmp_path: Path) -> None:
    history = history_with_updates()
    history.layers.to_csv(tmp_path / "layers.csv")
    with open(tmp_path / "layers.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["name"]) for row in rows[:3]] == [
        ("0", "weight"),
        ("0", "bias"),
        ("10", "weight"),
    ]
    assert float(rows[0]["ratio"]) == history.layers.updates["weight"][0].ratio
    figure = history.plot_layers()
    assert [axes.get_title(loc="left") for axes in figure.axes if axes.get_xlabel()] == [
        "Norm of each parameter's gradient before clipping",
        "Update of each parameter, divided by its norm",
    ]
    history.to_html(tmp_path / "page.html")
    assert "update / weight" in (tmp_path / "page.html").read_text(encoding="utf-8")


def advice_for(**ratios: float) -> list[str]:
    history = History()
    for step in range(100):
        history.append(step, 1.0 + step % 7, INF, 1.0)
        if step % 10 == 0:
            early = 5.0 if step < 10 else 1.0
            changes = [ratio * early for ratio in ratios.values()]
            history.layers.append(
                step, [*ratios], [1.0] * len(ratios), [([*ratios], [1.0] * len(ratios), changes)]
            )
    return [note for note in history.suggest().words if note.startswith("Updates")]


def test_the_advice_names_parameters_that_move_too_far_or_hardly_at_all() -> None:
    large, small = advice_for(head=0.3, body=1e-3, frozen=0.0, scale=1e-8)
    assert "head (0.3) by more than a tenth" in large
    assert "scale (1e-08) by less than a millionth" in small
    assert not any(name in large + small for name in ("body", "frozen"))
    assert advice_for(body=1e-3, early=0.05) == []  # large in the warm-up alone


# Where a backward pass broke


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (
            "ab",
            "b is the last parameter with a non-finite gradient, and that of the next one, c, is finite",
        ),
        (
            "b",
            "b is the last parameter with a non-finite gradient, and that of the next one, c, is finite",
        ),
        ("abc", "No gradient is finite: look at the loss"),
        ("c", "c, the last parameter of the model, is not finite"),
    ],
)
def test_the_error_and_the_advice_say_where_the_backward_pass_broke(bad: str, said: str) -> None:
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(2)) for name in "abc"})
    # The optimizer's order is another one than the model's.
    optimizer = torch.optim.SGD([{"params": [model["c"]]}, {"params": [model["a"], model["b"]]}], lr=1.0)
    clipper = Clipper(optimizer, INF, model=model, layers_every=1)
    for policy in ("propagate", "error"):
        for name in "abc":
            model[name].grad = torch.tensor([1.0, math.nan if name in bad else 1.0])
        if policy == "propagate":
            optimizer.step()
            assert clipper.history.layers.names == [*"abc"]
            assert any(said in note for note in clipper.history.suggest().words)
        else:
            clipper.detach()
            Clipper(optimizer, 1.0, model=model, nonfinite="error")
            with pytest.raises(RuntimeError, match=said):
                optimizer.step()


def test_without_a_model_nothing_is_said_of_its_order() -> None:
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    clipper = Clipper(optimizer, 1.0, layers_every=1)
    weights[0].grad, weights[1].grad = torch.tensor([math.nan]), torch.ones(1)
    optimizer.step()
    assert not any("broke" in note for note in clipper.history.suggest().words)
