"""Which gradients are clipped together, with which threshold."""

from typing import Any

import pytest
import torch
from clipper_helpers import (
    INF,
    NAN,
    Answering,
    each_scope,
    everything,
    fused_or_not,
    grad_norms,
    gradients,
    sgd,
    two_groups,
)
from helpers import last_of, with_gradients
from torch import Tensor

from torchclip import Clipper, Percentile, ZScore
from torchclip.clipper import Scope

pytestmark = pytest.mark.usefixtures("each_way")


@each_scope
def test_a_step_without_any_gradient(scope: Scope) -> None:
    optimizer = torch.optim.Adam(with_gradients([None, None]))
    clipper = Clipper(optimizer, 1.0, scope=scope)
    optimizer.step()
    assert last_of(clipper)[1:] == (0.0, 1.0 if scope != "parameter" else INF, 1.0, False, False, False, None)
    assert clipper.norms() == {}


@pytest.mark.parametrize(
    ("scope", "expected"),
    [("global", [5 / 125**0.5, 10 / 125**0.5]), ("group", [1, 1]), ("parameter", [1, 1])],
)
def test_what_is_clipped_together(scope: Scope, expected: list[float]) -> None:
    optimizer = two_groups()
    clipper = Clipper(optimizer, 1.0, scope=scope)
    optimizer.step()
    assert grad_norms(optimizer) == pytest.approx(expected, rel=1e-5)
    assert last_of(clipper).total_norm == pytest.approx(125**0.5)
    assert last_of(clipper).clip_coef == pytest.approx(1 / 125**0.5 if scope == "global" else 0.1, rel=1e-5)


@each_scope
def test_a_groups_own_max_norm_can_change(scope: Scope) -> None:
    optimizer = two_groups(max_norm=0.5)
    clipper = Clipper(optimizer, 2.0, scope=scope)
    seen = []
    for own in (0.5, None, torch.tensor(4.0)):
        optimizer.param_groups[1]["max_norm"] = own
        for group, grad in zip(optimizer.param_groups, ([3.0, 4.0], [6.0, 8.0]), strict=True):
            group["params"][0].grad = torch.tensor(grad)
        optimizer.step()
        seen += grad_norms(optimizer)
    assert seen == pytest.approx([2, 0.5, 2, 10, 2, 4], rel=1e-5)
    assert [r.max_norm for r in clipper.history] == [0.5, 2.0, 2.0]
    assert [r.total_norm for r in clipper.history] == pytest.approx([125**0.5] * 3)


def test_all_groups_unclipped() -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])])
    optimizer.param_groups[0]["max_norm"] = None
    clipper = Clipper(optimizer, 1.0)
    optimizer.step()
    assert gradients(optimizer)[0].tolist() == [3.0, 4.0]
    assert clipper.last == (0, 5.0, INF, 1.0, False, False, False, None)


@pytest.mark.parametrize(("own", "error"), [(-1.0, ValueError), (NAN, ValueError), ("abc", TypeError)])
def test_a_groups_own_max_norm_is_checked_before_anything_changes(own: Any, error: type[Exception]) -> None:
    optimizer = two_groups(max_norm=own)
    clipper = Clipper(optimizer, 1.0, scope="group")
    before = everything(optimizer)
    with pytest.raises(error, match=r"param_groups\[1\]\['max_norm'\]"):
        optimizer.step()
    assert grad_norms(optimizer) == [5.0, 10.0]
    assert everything(optimizer) == before
    assert clipper.last is None


@each_scope
def test_what_is_clipped_apart_learns_apart(scope: Scope) -> None:
    threshold = Percentile(50)
    optimizer = two_groups()
    Clipper(optimizer, threshold, scope=scope)
    seen = []
    for factor in (1.0, 3.0):
        for group, grad in zip(optimizer.param_groups, ([3.0, 4.0], [6.0, 8.0]), strict=True):
            group["params"][0].grad = torch.tensor(grad) * factor
        optimizer.step()
        seen += grad_norms(optimizer)
    assert seen == pytest.approx([5, 10, 10, 20], rel=1e-5)  # the median of 1 and 3 is 2
    assert threshold.state_dict()["norms"] == []


@pytest.mark.parametrize(
    ("max_norm", "error", "message"),
    [
        (Answering(NAN), ValueError, "Answering.update"),
        (Answering(-1.0), ValueError, "Answering.update"),
        (Answering(None), TypeError, "Answering.update"),
        (lambda step: NAN, ValueError, r"max_norm\(0\)"),
        (lambda step: -1.0, ValueError, r"max_norm\(0\)"),
        (lambda step: "abc", TypeError, r"max_norm\(0\)"),
    ],
)
def test_impossible_thresholds_are_refused_before_anything_changes(
    max_norm: Any, error: type[Exception], message: str
) -> None:
    optimizer = two_groups()
    clipper = Clipper(optimizer, max_norm)
    before = everything(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert grad_norms(optimizer) == [5.0, 10.0]
    assert everything(optimizer) == before
    assert not hasattr(optimizer, "grad_scale")
    assert clipper.last is None


def test_a_group_without_parameters_does_not_count() -> None:
    (weight,) = with_gradients([torch.tensor([3.0, 4.0])])
    groups: list[dict[str, Any]] = [{"params": [weight], "max_norm": 2.0}, {"params": []}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    clipper = Clipper(optimizer, Percentile())
    optimizer.step()
    assert last_of(clipper).max_norm == 2.0
    assert clipper.thresholds["all"].state_dict()["norms"] == []


@each_scope
@pytest.mark.parametrize("max_norm", [Percentile(100), ZScore(warmup=1)])
def test_a_norm_at_a_threshold_that_learns_is_left_alone(max_norm: Any, scope: Scope) -> None:
    optimizer = sgd([torch.tensor([3e-6, 4e-6])])
    clipper = Clipper(optimizer, max_norm, scope=scope)
    for _ in range(3):
        optimizer.step()
    assert gradients(optimizer)[0].tolist() == torch.tensor([3e-6, 4e-6]).tolist()
    assert clipper.history.summary().clipped == 0


def of_norms(*norms: float) -> list[Tensor]:
    return [torch.tensor([0.0, norm]) for norm in norms]


@fused_or_not
@pytest.mark.parametrize(
    ("scale", "scope"), [(1e-12, "global"), (1e-8, "parameter"), (1.0, "global"), (1e8, "parameter")]
)
def test_a_learned_threshold_is_met_exactly(scope: Scope, scale: float, fused: bool) -> None:
    optimizer = sgd(of_norms(10 * scale), fused=fused)
    clipper = Clipper(optimizer, Answering(scale), scope=scope)
    optimizer.step()
    assert last_of(clipper).clip_coef == pytest.approx(0.1, rel=1e-6)
    assert grad_norms(optimizer) == pytest.approx([scale], rel=1e-6)


@each_scope
def test_a_callable_is_asked_once_a_step(scope: Scope) -> None:
    asked = []

    def max_norm(step: int) -> float:
        asked.append(step)
        return 1.0

    optimizer = two_groups()
    Clipper(optimizer, max_norm, scope=scope)
    optimizer.step()
    optimizer.step()
    assert asked == [0, 1]
