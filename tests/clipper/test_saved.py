"""The state of a Clipper, saved in every way; copies."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from clipper_helpers import Net, fused_or_not, sgd, train
from helpers import with_gradients

from torchclip import Clipper, Percentile, RollingSigma, Value, ZScore
from torchclip.history.history import History


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
    "zscore": lambda: ZScore(warmup=4, threshold=0.5),
    "value": lambda: Value(0.01),
    "growing": Growing,
}


def through_dcp(clipper: Clipper, fresh: Clipper, path: Path) -> None:
    dcp.save({"clipper": clipper}, checkpoint_id=path)
    dcp.load({"clipper": fresh}, checkpoint_id=path)


def through_a_tree(clipper: Clipper, fresh: Clipper, path: Path) -> None:
    state = {"application": {"step": 3, "parts": [{"clipper": clipper.state_dict()}]}}
    dcp.save(state, checkpoint_id=path)
    loaded = {"application": {"step": 0, "parts": [{"clipper": fresh.state_dict()}]}}
    dcp.load(loaded, checkpoint_id=path)
    assert loaded["application"]["step"] == 3
    fresh.load_state_dict(loaded["application"]["parts"][0]["clipper"])  # type: ignore[index]


# DCP warns of a format that torch itself uses.
quiet = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch")


def run(kind: str, scope: Any = "global", **options: Any) -> tuple[Net, torch.optim.AdamW, Clipper]:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return model, optimizer, Clipper(optimizer, KINDS[kind](), scope=scope, **options)


@quiet
@pytest.mark.parametrize("way", [through_dcp, through_a_tree])
def test_states_of_any_length_survive_a_distributed_checkpoint(
    way: Callable[..., None], tmp_path: Path
) -> None:
    """DCP loads only keys that a fresh state has."""
    options: dict[str, Any] = {"skip_above": RollingSigma(window=3, warmup=2), "layers_every": 2}
    model, optimizer, clipper = run("growing", "parameter", **options)
    for step in range(3):
        _, _kept, its_clipper = run("growing", "parameter", **options)
        way(clipper, its_clipper, tmp_path / str(step))
        assert str(its_clipper.state_dict()) == str(clipper.state_dict())  # as NaN differs from NaN
        train(model, optimizer, range(step, step + 1))


def test_a_state_that_is_refused_changes_nothing() -> None:
    model, optimizer, clipper = run("percentile", skip_above=RollingSigma(window=3, warmup=2))
    train(model, optimizer, range(4))
    good = clipper.state_dict()
    train(model, optimizer, range(4, 5))  # so that a part that is loaded shows
    before, limit = str(clipper.state_dict()), good["skip_above"]["all"]
    own_set = good["thresholds"]["all"]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "`state` lacks 'steps'"),
        (optimizer.state_dict(), "Clipper.state_dict"),
        ({**good, "steps": "x"}, r"`state\['steps'\]` must be of type int, got 'x'"),
        ({**good, "steps": -1}, r"`state\['steps'\]` must be at least 0, got -1"),
        ({**good, "steps": True}, r"`state\['steps'\]` must be an integer, got True"),
        ({**good, "skips": {**good["skips"], "skip_above": -1}}, r"\['skip_above'\]` must be at least 0"),
        ({**good, "scope": "layer"}, r"`state\['scope'\]` must be one of 'global'"),
        ({"of rank 0": [1]}, r"`state\['of rank 0'\]` must be a dictionary, got \[1\]"),
        ({**good, "sets": [["all"]]}, r"\['all'\], which this Clipper does not clip"),
        ({**good, "scope": "group"}, r"\('group', 2.0\)"),
        ({**good, "norm_type": 1.0}, r"norms of .*\('global', 1.0\)"),
        ({**good, "optimizers": 2}, "that of a Clipper of 2 optimizer"),
        ({**good, "sets": ["all", "group 7"]}, "'group 7', which this Clipper does not clip"),
        ({**good, "thresholds": {"all": ZScore().state_dict()}}, "kind 'ZScore'"),
        ({**good, "thresholds": {"group 7": own_set}}, "'group 7', which this Clipper does not clip"),
        ({**good, "skip_above": {"all": {"kind": "other"}}}, "kind 'other'"),
        ({**good, "skip_above": {"other": limit}}, "'other', which this Clipper does not clip"),
        ({**good, "skips": {"nonfinite": 0}}, "lacks 'skip_above', 'skip_loss_above'"),
        ({**good, "skips": {**good["skips"], "nonfinite": "0"}}, r"`state\['skips'\]\['nonfinite'\]` must"),
        ({**good, "thresholds": {}, "history": {"records": {}}}, "History.state_dict"),
        *(({**good, key: 1j}, rf"`state\['{key}'\]` must be of type") for key in good),
        *(({k: v for k, v in good.items() if k != key}, f"`state` lacks '{key}'") for key in good),
    ]
    for state, message in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            clipper.load_state_dict(state)
        assert str(clipper.state_dict()) == before
    of_limit = {**good, "thresholds": {}, "sets": [], "max_norm": "a number"}
    of_loss = {**of_limit, "skip_above": None, "skip_loss_above": good["skip_above"]}
    for max_norm, skip_above, state, message in (
        ("number", RollingSigma(window=3, warmup=2), {**of_limit, "norm_type": 1.0}, "norms of"),
        ("number", 5.0, of_limit, r"`skip_above` is 5\.0"),
        ("number", None, of_limit, "a `skip_above` has learned, but this clipper has none"),
        ("number", None, of_loss, "a `skip_loss_above` has learned, but this clipper has none"),
        ("number", None, good, r"`max_norm` is 0\.5"),
        ("value", None, good, "threshold object"),
        ("zscore", None, good, "kind 'Percentile'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(max_norm, skip_above=skip_above)[2].load_state_dict(state)


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (("number",), ("zscore",), "`max_norm` was 'a number' and is 'ZScore'"),
        (("value",), ("number",), "`max_norm` was 'Value' and is 'a number'"),
        (("number", "group"), ("number", "parameter"), "`scope` was 'group' and is 'parameter'"),
        (("number", "global", 1.0), ("callable", "global", 2.0), "`norm_type` was 1.0 and is 2.0"),
    ],
)
def test_a_state_that_has_learned_nothing_loads_into_another_kind_with_a_warning(
    before: Any, now: Any, message: str
) -> None:
    def made(kind: str, scope: Any = "global", norm_type: float = 2.0) -> Any:
        return run(kind, scope, norm_type=norm_type)

    (model, optimizer, clipper), (_, _kept, other) = made(*before), made(*now)
    train(model, optimizer, range(3))
    with pytest.warns(UserWarning, match=message) as caught:
        other.load_state_dict(clipper.state_dict())
    assert [warning.filename for warning in caught] == [__file__]
    assert list(other.history) == list(clipper.history)
    assert other.state_dict()["steps"] == 3


def test_a_state_without_a_limit_that_has_learned_forgets_this() -> None:
    model, optimizer, clipper = run("number", skip_above=RollingSigma(window=3, warmup=2))
    fresh = str(clipper.state_dict()["skip_above"])
    train(model, optimizer, range(4))
    assert str(clipper.state_dict()["skip_above"]) != fresh
    clipper.load_state_dict(run("number")[2].state_dict())
    assert str(clipper.state_dict()["skip_above"]) == fresh


def test_no_state_is_loaded_during_a_step() -> None:
    _, _kept, clipper = run("number")
    state = clipper.state_dict()
    with pytest.raises(RuntimeError, match=r"load_state_dict\(\) was called during a step"):
        _kept.step(lambda: clipper.load_state_dict(state))
    assert clipper.state_dict() == state


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
    clipper.history = History(maxlen=2)
    for _ in range(5):
        optimizer.step()
    assert [record.step for record in clipper.history] == [3, 4]
    its_clipper = Clipper(sgd([torch.tensor([3.0, 4.0])]), 1.0)
    its_clipper.history = History(maxlen=1)
    its_clipper.load_state_dict(clipper.state_dict())
    assert [record.step for record in its_clipper.history] == [4]
    assert its_clipper.history.summary().steps == 5


def test_a_history_is_a_clippers_own() -> None:
    first, second = sgd([torch.ones(2)]), sgd([torch.ones(2)])
    clipper, other = Clipper(first, 1.0), Clipper(second, 1.0)
    first.step()
    kept = clipper.history
    for wrong, error in (([], TypeError), (None, TypeError), (other.history, ValueError)):
        with pytest.raises(error, match=r"`history` (must be a torchclip|already belongs)"):
            clipper.history = wrong  # type: ignore[assignment]
        assert clipper.history is kept
    clipper.history = kept
    for _ in range(1100):  # more than are kept before they are recorded
        first.step()
    clipper.history = History(maxlen=1)
    first.step()
    assert (len(kept), len(clipper.history)) == (1101, 1)
    clipper.detach()
    other.history = kept  # which no longer exist
    second.step()
    assert (len(kept), kept[-1].step) == (1102, 0)
