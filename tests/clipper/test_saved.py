"""The state of a Clipper, through every way of saving it, and from the version before."""

import contextlib
import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from clipper_helpers import Answering, Net, backward, sgd, train
from torch import nn

from torchclip import AdaGC, Clipper, Percentile, RollingSigma, Value, ZScore
from torchclip.history.history import History

pytestmark = pytest.mark.usefixtures("each_way")

# What version 0.1.0 saved after six steps, one of each kind.
OF_0_1_0: dict[str, Any] = json.loads((Path(__file__).parent / "states_0_1_0.json").read_text())


class Growing:
    """A user's own threshold, whose state gets a key at each step."""

    def __init__(self) -> None:
        self.norms: dict[str, float] = {}

    def update(self, norm: float) -> float:
        self.norms[f"step {len(self.norms)}"] = norm
        return min(self.norms.values())

    def state_dict(self) -> dict[str, Any]:
        return dict(self.norms)

    def load_state_dict(self, state: Any) -> None:
        self.norms = dict(state)


KINDS: dict[str, Callable[[], Any]] = {
    "number": lambda: 0.5,
    "callable": lambda: lambda step: 1 / (1 + step),
    "percentile": lambda: Percentile(30),
    "percentile_window": lambda: Percentile(30, window=4),
    "zscore": lambda: ZScore(warmup=4, threshold=0.5),
    "rolling_sigma": lambda: RollingSigma(window=4, warmup=3),
    "adagc": lambda: AdaGC(warmup=3),
    "value": lambda: Value(0.01),
    "own": lambda: Answering(0.5, 1.0, 0.2),
    "growing": Growing,
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def through_torch(clipper: Clipper, fresh: Clipper, path: Path) -> None:
    file = io.BytesIO()
    torch.save(clipper.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))


def through_json(clipper: Clipper, fresh: Clipper, path: Path) -> None:
    fresh.load_state_dict(json.loads(json.dumps(clipper.state_dict())))


def through_dcp(clipper: Clipper, fresh: Clipper, path: Path) -> None:
    dcp.save({"clipper": clipper}, checkpoint_id=path, no_dist=True)
    dcp.load({"clipper": fresh}, checkpoint_id=path, no_dist=True)


def through_a_tree(clipper: Clipper, fresh: Clipper, path: Path) -> None:
    state = {"application": {"step": 3, "parts": [{"clipper": clipper.state_dict()}]}}
    dcp.save(state, checkpoint_id=path, no_dist=True)
    loaded = {"application": {"step": 0, "parts": [{"clipper": fresh.state_dict()}]}}
    dcp.load(loaded, checkpoint_id=path, no_dist=True)
    assert loaded["application"]["step"] == 3
    fresh.load_state_dict(loaded["application"]["parts"][0]["clipper"])  # type: ignore[index]


WAYS = [through_torch, through_json, through_dcp, through_a_tree]
# DCP warns of a format that torch itself uses.
quiet = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch")


def run(kind: str, scope: Any = "global", **options: Any) -> tuple[Net, torch.optim.AdamW, Clipper]:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return model, optimizer, Clipper(optimizer, KINDS[kind](), scope=scope, **options)


@quiet
@each_kind
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scope": "parameter"},
        {"skip_above": 40.0, "max_skips": 2},
        {"skip_above": RollingSigma(window=3, warmup=2), "layers_every": 2},
    ],
    ids=["global", "parameter", "skip_above", "learned skip_above"],
)
@pytest.mark.filterwarnings("ignore:step")  # of spikes that are taken
def test_a_state_survives(kind: str, way: Callable[..., None], options: Any, tmp_path: Path) -> None:
    model, optimizer, clipper = run(kind, **options)
    train(model, optimizer, range(6))
    clipper.loss = 3.0
    train(model, optimizer, range(6, 7))
    resumed, its_optimizer, its_clipper = run(kind, **options)
    way(clipper, its_clipper, tmp_path)
    assert its_clipper.state_dict() == clipper.state_dict()
    resumed.load_state_dict(model.state_dict())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(7, 10))
    train(resumed, its_optimizer, range(7, 10))
    assert its_clipper.state_dict() == clipper.state_dict()
    assert list(its_clipper.history) == list(clipper.history)
    assert its_clipper.history[6].loss == 3.0


@quiet
@each_kind
@pytest.mark.parametrize("way", [through_dcp, through_json])
def test_a_state_of_any_step_survives(kind: str, way: Callable[..., None], tmp_path: Path) -> None:
    model, optimizer, clipper = run(kind, "parameter")
    for step in range(4):
        _, _, its_clipper = run(kind, "parameter")
        way(clipper, its_clipper, tmp_path / str(step))
        assert str(its_clipper.state_dict()) == str(clipper.state_dict())  # of no step the largest is NaN
        train(model, optimizer, range(step, step + 1))


@pytest.mark.parametrize("name", OF_0_1_0)
def test_states_of_the_version_before_load(name: str) -> None:
    saved = OF_0_1_0[name]
    kind, _, scope = name.partition(", ")
    options: dict[str, Any] = {}
    if kind.startswith("skip_above"):
        limits = {"skip_above number": 3.0, "skip_above percentile": Percentile(60)}
        limits["skip_above rolling_sigma"] = RollingSigma(window=4, warmup=3)
        kind, options = "number", {"skip_above": limits[kind], "max_skips": 2}
    if kind == "layers":
        kind, options = "number", {"layers_every": 2}
    if kind == "fresh":
        kind, options = "zscore", {"skip_above": 3.0}
    model, optimizer, clipper = run(kind, scope or "global", **options)
    clipper.load_state_dict(saved)
    state = clipper.state_dict()
    assert state["steps"] == saved["steps"] == len(clipper.history)
    for part, its in ((state["history"]["records"], saved["history"]["records"]),):
        assert {key: part[key] for key in its} == its
    assert state["history"]["layers"] == saved["history"]["layers"]
    own = {key: value[0] if isinstance(value, tuple) else value for key, value in state["thresholds"].items()}
    for key, learned in saved["thresholds"].items():
        assert {k: own[key][k] for k in learned if k in own[key]}.items() <= learned.items()
    if saved["spikes"] is not None:
        assert state["spikes"]["skips"] == saved["spikes"]["skips"]
    train(model, optimizer, range(6, 8))


def test_a_state_that_is_refused_changes_nothing() -> None:
    model, optimizer, clipper = run("percentile", skip_above=RollingSigma(window=3, warmup=2))
    train(model, optimizer, range(4))
    before, good = str(clipper.state_dict()), clipper.state_dict()
    spikes = good["spikes"]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"spikes": {"skips": 1, "thresholds": {"all": {"kind": "other"}}}}, "kind 'other'"),
        ({"spikes": {**spikes, "skips": -1}}, "at least 0"),
        ({"thresholds": {"all": {"kind": "ZScore"}}}, "kind 'ZScore'"),
        (
            {"thresholds": {"group 7": good["thresholds"]["all"]}},
            "'group 7', which this Clipper does not clip",
        ),
        ({"sets": ["all", "group 7"]}, "'group 7', which this Clipper does not clip"),
        ({"norm_type": 1.0}, "norms of"),
        ({"history": {"records": {}}}, "History.state_dict"),
        ({"optimizers": 2}, "that of a Clipper of 2 optimizers"),
    ]
    for part, message in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            clipper.load_state_dict({**good, "steps": 99, **part})
        assert str(clipper.state_dict()) == before
    of_limit = run("number", skip_above=RollingSigma(window=3, warmup=2))
    with pytest.raises(ValueError, match="norms of"):
        of_limit[2].load_state_dict({**good, "thresholds": {}, "sets": [], "norm_type": 1.0})


def test_a_state_without_spikes_forgets_them() -> None:
    model, optimizer, clipper = run("number", skip_above=RollingSigma(window=3, warmup=2))
    fresh = str(clipper.state_dict()["spikes"])
    train(model, optimizer, range(4))
    assert str(clipper.state_dict()["spikes"]) != fresh
    clipper.load_state_dict(run("number")[2].state_dict())
    assert str(clipper.state_dict()["spikes"]) == fresh


@pytest.mark.parametrize("kind", ["adagc", "percentile", "percentile_window", "zscore", "rolling_sigma"])
def test_after_a_load_other_gradients_are_there(kind: str) -> None:
    model, optimizer, clipper = run(kind, "parameter")
    train(model, optimizer, range(4))
    for present in ((), (0,), (1, 2)):
        _, its_optimizer, its_clipper = run(kind, "parameter")
        its_clipper.load_state_dict(clipper.state_dict())
        for i, parameter in enumerate(its_optimizer.param_groups[0]["params"]):
            parameter.grad = torch.ones_like(parameter) if i in present else None
        its_optimizer.step()
        its_optimizer.step()
        assert its_clipper.state_dict()["steps"] == 6


def test_a_group_that_was_added_is_in_the_state() -> None:
    model, optimizer, clipper = run("percentile", "group")
    train(model, optimizer, range(2))
    for each in (optimizer, run("percentile", "group")[1]):
        each.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    state = clipper.state_dict()
    assert list(state["thresholds"]) == ["group 0", "group 1"]
    with pytest.raises(ValueError, match="'group 1', which this Clipper does not clip"):
        run("percentile", "group")[2].load_state_dict(state)


def test_max_skips_with_a_nan_between() -> None:
    """A NaN says nothing about the norms in a row, in host memory as on a device."""
    for fused in (False, True):
        optimizer = sgd([torch.tensor([3.0, 4.0])], fused=fused)
        clipper = Clipper(optimizer, 100.0, skip_above=1.0, max_skips=2)
        (parameter,) = optimizer.param_groups[0]["params"]
        skipped: list[bool] = []
        for norm in (5.0, float("nan"), 5.0, 5.0):
            parameter.grad = torch.tensor([norm, 0.0])
            with (
                pytest.warns(UserWarning, match="was taken")
                if len(skipped) == 3
                else contextlib.nullcontext()
            ):
                optimizer.step()
            skipped.append(clipper.history[-1].skipped)
        assert skipped == [True, False, True, False]


def test_a_history_is_a_clippers_own() -> None:
    first, second = sgd([torch.ones(2)]), sgd([torch.ones(2)])
    clipper, other = Clipper(first, 1.0), Clipper(second, 1.0)
    first.step()
    kept = clipper.history
    for wrong, error in (([], TypeError), (None, TypeError), (other.history, ValueError)):
        with pytest.raises(error, match="`history`"):
            clipper.history = wrong  # type: ignore[assignment]
        assert clipper.history is kept
    first.step()
    assert len(clipper.history) == 2
    clipper.history = History(maxlen=1)
    first.step()
    assert (len(kept), len(clipper.history)) == (2, 1)


def test_a_backward_is_still_possible() -> None:
    model, optimizer, clipper = run("number")
    loss = backward(model, optimizer, 0)
    clipper.loss = loss
    optimizer.step()
    assert clipper.history[-1].loss == pytest.approx(loss.item())
