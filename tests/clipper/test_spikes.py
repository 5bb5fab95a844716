"""Steps that are skipped because their norm is above a limit."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from clipper_helpers import INF, NAN, Answering, everything, fused_or_not, sgd
from helpers import interrupted_sgd, last_of
from torch import nn

from torchclip import Clipper, Percentile
from torchclip.clipper import Scope

pytestmark = pytest.mark.usefixtures("everywhere", "small_ones_too")


def steps_with(
    norms: Sequence[float], fused: bool, kind: Any = torch.optim.SGD, **options: Any
) -> tuple[list[float], Clipper]:
    """How far each step moves a parameter whose gradients have these norms."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = kind([weight], lr=1.0, fused=fused)
    clipper = Clipper(optimizer, **{"max_norm": INF, **options})
    moved = []
    for norm in norms:
        before = weight.detach().clone()
        weight.grad = torch.tensor([0.6, 0.8]) * norm
        optimizer.step()
        moved.append(round(float((weight.detach() - before).norm()), 4))
        assert not hasattr(optimizer, "found_inf")
        assert not hasattr(optimizer, "grad_scale")
    return moved, clipper


@fused_or_not
@pytest.mark.parametrize(
    ("limit", "scope"),
    [
        (5.0, "global"),
        (lambda step: 5.0, "group"),
        (Answering(5.0), "parameter"),
        ("5", "global"),
        (torch.tensor(5.0), "parameter"),
    ],
    ids=["number", "callable", "object", "text", "tensor"],
)
def test_steps_above_the_limit_are_left_out(limit: Any, scope: Scope, fused: bool) -> None:
    moved, clipper = steps_with([1.0, 9.0, 5.0, 6.0, 2.0], fused, max_norm=3.0, scope=scope, skip_above=limit)
    assert moved == pytest.approx([1.0, 0.0, 3.0, 0.0, 2.0], abs=1e-4)
    assert [r.skipped for r in clipper.history] == [False, True, False, True, False]
    assert [r.step for r in clipper.history] == [0, 1, 2, 3, 4]
    assert clipper.history.summary().skipped == 2


@fused_or_not
@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_a_step_left_out_changes_neither_parameters_nor_state_and_its_gradients_are_there_after(
    name: str, fused: bool
) -> None:
    weight = nn.Parameter(torch.ones(3))
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)([weight], lr=0.1, fused=fused, **momentum)
    Clipper(optimizer, 1.0, skip_above=10.0)
    weight.grad = torch.ones(3)
    optimizer.step()
    before = copy.deepcopy(everything(optimizer))
    weight.grad = torch.full((3,), 100.0)
    optimizer.step()
    assert everything(optimizer) == before
    assert weight.grad is not None
    weight.grad = torch.ones(3)
    optimizer.step()
    assert everything(optimizer) != before


@fused_or_not
def test_after_max_skips_the_next_one_is_taken_clipped_with_one_warning(fused: bool, everywhere: str) -> None:
    norms = [1.0, 20.0, 20.0, 20.0, 20.0, 20.0, 20.0, 1.0, 20.0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        moved, clipper = steps_with(norms, fused, max_norm=7.0, skip_above=5.0, max_skips=2)
    assert moved == pytest.approx([1.0, 0.0, 0.0, 5.0, 0.0, 0.0, 5.0, 1.0, 0.0], abs=1e-3)
    skipped = [r.skipped for r in clipper.history]
    assert skipped == [False, True, True, False, True, True, False, False, True]
    assert clipper.history[3].clip_coef == pytest.approx(0.25)
    messages = [str(w.message) for w in caught]
    if everywhere == "accelerator" and fused:
        assert messages == []  # a warning would have to wait
    else:
        assert len(messages) == 1
        assert "step 3 was taken, clipped to 5" in messages[0]
        assert clipper.history[3].max_norm == 5.0


@fused_or_not
@pytest.mark.filterwarnings("ignore:step")
def test_the_tighter_threshold_clips_a_step_that_is_taken_all_the_same(fused: bool) -> None:
    moved, _ = steps_with([20.0, 20.0], fused, max_norm=2.0, skip_above=5.0, max_skips=1)
    assert moved == pytest.approx([0.0, 2.0], abs=1e-4)


@fused_or_not
@pytest.mark.parametrize(("value", "policy"), [(INF, "skip"), (NAN, "skip"), (INF, "propagate")])
def test_steps_that_are_not_finite_are_never_taken_instead(value: float, policy: str, fused: bool) -> None:
    norms = [9.0, 9.0, value, value, 1.0]
    moved, clipper = steps_with(norms, fused, skip_above=5.0, max_skips=2, nonfinite=policy)
    assert moved == pytest.approx([0.0, 0.0, 0.0, 0.0, 1.0], abs=1e-4)
    assert all(r.skipped for r in list(clipper.history)[:4])


@fused_or_not
def test_with_zero_the_norm_is_that_of_what_is_finite(fused: bool) -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)
    clipper = Clipper(optimizer, INF, nonfinite="zero", skip_above=5.0)
    for grad in ([3.0, 0.0, NAN], [30.0, 0.0, INF]):
        weight.grad = torch.tensor(grad)
        optimizer.step()
    assert weight.tolist() == [-3.0, 0.0, 0.0]
    assert [r.skipped for r in clipper.history] == [False, True]


@fused_or_not
def test_no_gradient_is_no_spike(fused: bool) -> None:
    limit = Answering(0.0)
    optimizer = sgd([None], fused=fused)
    clipper = Clipper(optimizer, 1.0, skip_above=limit)
    optimizer.step()
    assert not last_of(clipper).skipped


@fused_or_not
def test_a_step_that_failed_does_not_count_as_left_out(fused: bool) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)
    clipper = Clipper(optimizer, INF, skip_above=5.0, max_skips=1)
    weight.grad = torch.tensor([0.0, 9.0])
    if fused:  # the step of others is not reached without a gradient
        with interrupted_sgd():
            optimizer.step()
    optimizer.step()
    assert last_of(clipper).skipped
    assert weight.grad is not None
    assert not hasattr(optimizer, "found_inf")


@fused_or_not
@pytest.mark.filterwarnings("ignore:step")
def test_a_resumed_run_counts_on(fused: bool) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)
    weight.grad = torch.tensor([0.0, 9.0])
    state: dict[str, Any] | None = None
    for _ in range(3):
        with Clipper(optimizer, INF, skip_above=Percentile(0, max_norm=5.0), max_skips=2) as clipper:
            if state is not None:
                clipper.load_state_dict(state)
            weight.grad = torch.tensor([0.0, 9.0])
            optimizer.step()
            state = copy.deepcopy(clipper.state_dict())
    assert [r.skipped for r in clipper.history] == [True, True, False]
    assert state is not None
    assert state["spikes"]["thresholds"]["all"]["norms"] == [9.0, 9.0, 9.0]


@fused_or_not
@pytest.mark.filterwarnings("ignore:step")
def test_a_nan_says_nothing_about_how_many_steps_were_skipped_in_a_row(fused: bool) -> None:
    _, clipper = steps_with([5.0, NAN, 5.0, 5.0], fused, skip_above=1.0, max_skips=2)
    assert [record.skipped for record in clipper.history] == [True, False, True, False]


@fused_or_not
@pytest.mark.parametrize("limit", [lambda step: [9.0, 1.0, 9.0][step], Answering(9.0, 1.0, 9.0)])
def test_each_step_has_a_limit_of_its_own(limit: Any, fused: bool) -> None:
    _, clipper = steps_with([5.0, 5.0, 5.0], fused, skip_above=limit)
    assert [record.skipped for record in clipper.history] == [False, True, False]


def test_on_clip_is_told_and_what_it_changes_is_judged_by_the_same_limit() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    seen: list[bool] = []

    def on_clip(record: Any) -> None:
        seen.append(record.skipped)
        assert weight.grad is not None
        weight.grad.mul_(2)

    limit = Answering(5.0)
    clipper = Clipper(optimizer, INF, skip_above=limit, on_clip=on_clip)
    for norm in (2.0, 4.0, 9.0):
        weight.grad = torch.tensor([0.0, norm])
        optimizer.step()
    assert seen == [False, False, True]
    assert [r.skipped for r in clipper.history] == [False, True, True]
    assert weight.tolist() == [0.0, -4.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_above": -1.0}, "`skip_above` must be at least 0"),
        ({"skip_above": "abc"}, "`skip_above`"),
        ({"skip_above": [1.0]}, "`skip_above`"),
        ({"skip_above": Percentile}, r"`skip_above` is the class Percentile; pass an object"),
        ({"skip_above": 1.0, "max_skips": 0}, "`max_skips` must be at least 1"),
        ({"skip_above": 1.0, "max_skips": 1.5}, "`max_skips`"),
        ({"max_skips": 1}, "`max_skips` limits how often `skip_above`"),
    ],
)
def test_misuse_is_refused(options: dict[str, Any], message: str) -> None:
    optimizer = sgd([torch.ones(2)])
    with pytest.raises((TypeError, ValueError), match=message):
        Clipper(optimizer, 1.0, **options)
    Clipper(optimizer, 1.0)


def test_lbfgs_cannot_leave_steps_out() -> None:
    with pytest.raises(ValueError, match="`skip_above` does not work with LBFGS"):
        Clipper(torch.optim.LBFGS([nn.Parameter(torch.ones(1))]), 1.0, skip_above=5.0)


def test_a_limit_that_answers_nonsense_is_refused_before_anything_changes() -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])])
    before = everything(optimizer)
    for limit in (Answering(NAN), lambda step: -1.0):
        with (
            Clipper(optimizer, 1.0, skip_above=limit),
            pytest.raises(ValueError, match=r"update\(\)|skip_above"),
        ):
            optimizer.step()
        assert everything(optimizer) == before
