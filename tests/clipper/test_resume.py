"""A run that goes on after a break, and copies."""

import copy
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from clipper_helpers import (
    Answering,
    Net,
    backward,
    each_scope,
    equal,
    everything,
    fused_or_not,
    sgd,
    train,
)
from helpers import with_gradients

import torchclip
from torchclip import AdaGC, Clipper, Percentile, RollingSigma, ZScore
from torchclip.clipper import Scope

pytestmark = pytest.mark.usefixtures("each_way")


def resumable(
    fused: bool, max_norm: Callable[[], Any], scope: Scope
) -> tuple[Net, torch.optim.AdamW, Clipper]:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    return model, optimizer, Clipper(optimizer, max_norm(), scope=scope)


def through_torch(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_json(state: dict[str, Any]) -> Any:
    return json.loads(json.dumps(state))


@fused_or_not
@each_scope
@pytest.mark.parametrize("through", [through_torch, through_json])
@pytest.mark.parametrize(
    "max_norm",
    [
        lambda: 0.5,
        lambda: lambda step: 1 / (1 + step),
        lambda: Percentile(30, window=5),
        lambda: ZScore(warmup=8, threshold=0.5),
        lambda: Answering(0.5, 1.0, 0.2),
    ],
)
def test_a_resumed_run_goes_on_as_if_there_had_been_no_break(
    max_norm: Any, through: Callable[[Any], Any], scope: Scope, fused: bool
) -> None:
    model, optimizer, clipper = resumable(fused, max_norm, scope)
    train(model, optimizer, range(6))
    saved = (
        copy.deepcopy(model.state_dict()),
        copy.deepcopy(optimizer.state_dict()),
        through(clipper.state_dict()),
    )
    train(model, optimizer, range(6, 15))

    resumed, its_optimizer, its_clipper = resumable(fused, max_norm, scope)
    parts: list[Any] = [resumed, its_optimizer, its_clipper]
    for part, state in zip(parts, saved, strict=True):
        part.load_state_dict(state)
    train(resumed, its_optimizer, range(6, 15))
    assert equal(model, resumed)
    assert everything(optimizer) == everything(its_optimizer)
    assert its_clipper.state_dict() == clipper.state_dict()
    assert list(its_clipper.history) == list(clipper.history)


class Steps:
    """A model of many small parameters, of which each step has gradients for some, and a Clipper.

    The gradients of a step depend on its number alone, so that a resumed run can go on with the same.
    """

    def __init__(self, max_norm: Any, scope: Scope) -> None:
        parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(18)]
        groups = [{"params": parameters[i : i + 1]} for i in range(18)]
        self.parameters, self.optimizer = parameters, torch.optim.SGD(groups, lr=0.1)
        self.clipper = Clipper(self.optimizer, max_norm, scope=scope)

    def take(self, steps: range, with_gradient: dict[int, int]) -> None:
        for step in steps:
            values = torch.randn(18, 2, generator=torch.Generator().manual_seed(step)).exp()
            for i, (parameter, value) in enumerate(zip(self.parameters, values, strict=True)):
                parameter.grad = value if i < with_gradient.get(step, 18) else None
            self.optimizer.step()


@each_scope
@pytest.mark.parametrize("then", [0, 1, 17], ids="{} gradients".format)
@pytest.mark.parametrize(
    "max_norm",
    [
        lambda: AdaGC(warmup=3),
        lambda: Percentile(30, window=4, warmup=1),
        lambda: Percentile(60),
        lambda: RollingSigma(sigma=0.5, window=4, warmup=3),
        lambda: ZScore(warmup=4, threshold=0.5),
    ],
    ids=["AdaGC", "Percentile", "Percentile of all", "RollingSigma", "ZScore"],
)
def test_a_state_of_any_step_loads_and_the_run_goes_on_with_any_gradients(
    max_norm: Any, then: int, scope: Scope
) -> None:
    for saved_at in (0, 1, 3, 5):
        with_gradient = {1: 16, saved_at: then}
        run, resumed = Steps(max_norm(), scope), Steps(max_norm(), scope)
        run.take(range(saved_at), with_gradient)
        resumed.clipper.load_state_dict(through_json(run.clipper.state_dict()))
        for parameter, value in zip(resumed.parameters, run.parameters, strict=True):
            parameter.data = value.data.clone()
        assert {*resumed.clipper.thresholds} == {*run.clipper.thresholds}
        for steps in (run, resumed):
            steps.take(range(saved_at, saved_at + 3), with_gradient)
        assert resumed.clipper.state_dict() == run.clipper.state_dict()
        assert str(resumed.parameters) == str(run.parameters)


def test_wrong_states_are_refused_and_change_nothing() -> None:
    model, optimizer, clipper = resumable(False, lambda: Percentile(30), "global")
    backward(model, optimizer, 0)
    optimizer.step()
    good = clipper.state_dict()
    before = str(good)
    broken_history = {**good, "thresholds": {}, "history": {"records": {}}}
    for state, message in [
        ({}, "`state` lacks 'steps'"),
        ({**good, "steps": "x"}, r"`state\['steps'\]` must be an integer, got 'x'"),
        ({**good, "steps": -1}, r"`state\['steps'\]` must be at least 0"),
        ({**good, "scope": 1}, r"`state\['scope'\]` must be one of"),
        ({**good, "norm_type": "two"}, r"`state\['norm_type'\]` must be a number"),
        ({**good, "thresholds": [1]}, r"`state\['thresholds'\]` must be a dictionary"),
        ({**good, "history": None}, r"`state\['history'\]` must be a dictionary"),
        (optimizer.state_dict(), "Clipper.state_dict"),
        ({**good, "scope": "group"}, r"\('group', 2.0\)"),
        ({**good, "norm_type": 1.0}, r"\('global', 1.0\)"),
        ({**good, "thresholds": {"all": ZScore().state_dict()}}, "kind 'ZScore'"),
        (broken_history, "History.state_dict"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            clipper.load_state_dict(state)
        assert str(clipper.state_dict()) == before
    numeric = Clipper(sgd([torch.ones(2)]), 1.0)
    with pytest.raises(ValueError, match=r"`max_norm` is 1\.0"):
        numeric.load_state_dict(good)


@fused_or_not
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
def test_copies_of_the_optimizer_do_not_clip_until_they_get_a_clipper(
    copied: Callable[[Any], Any], fused: bool
) -> None:
    optimizer = torch.optim.SGD(with_gradients([torch.tensor([3.0, 4.0])]), lr=1.0, fused=fused)
    clipper = Clipper(optimizer, Percentile(50, max_norm=1.0))
    optimizer.step()
    twin = copied(optimizer)
    (parameter,) = twin.param_groups[0]["params"]
    parameter.grad = torch.tensor([3.0, 4.0])
    twin.step()
    assert parameter.grad.tolist() == [3.0, 4.0]
    assert len(clipper.history) == 1
    its_clipper = Clipper(twin, Percentile(50, max_norm=1.0))
    its_clipper.load_state_dict(clipper.state_dict())
    twin.step()
    assert [record.step for record in its_clipper.history] == [0, 1]
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_clipper_cannot_be_copied(copied: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="load this one's state_dict"):
        copied(Clipper(sgd([torch.ones(2)]), 1.0))


def test_a_history_of_another_length_stays_when_a_state_is_loaded() -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])])
    clipper = Clipper(optimizer, 1.0)
    clipper.history = torchclip.history.History(maxlen=2)
    for _ in range(5):
        optimizer.step()
    assert [record.step for record in clipper.history] == [3, 4]
    its_clipper = Clipper(sgd([torch.tensor([3.0, 4.0])]), 1.0)
    its_clipper.history = torchclip.history.History(maxlen=1)
    its_clipper.load_state_dict(clipper.state_dict())
    assert [record.step for record in its_clipper.history] == [4]
    assert its_clipper.history.summary().steps == 5
