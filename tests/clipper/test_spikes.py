"""Steps that are skipped because their norm is above a limit."""

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from clipper_helpers import INF, NAN, Answering, fused_or_not
from helpers import last_of
from torch import nn

from torchclip import Clipper, RollingSigma
from torchclip.clipper import Scope
from torchclip.history import Record

pytestmark = [
    pytest.mark.usefixtures("everywhere", "small_ones_too"),
    pytest.mark.filterwarnings("ignore:step"),  # of spikes that are taken
]


def steps_with(
    norms: Sequence[float | None], fused: bool, kind: Any = torch.optim.SGD, **options: Any
) -> tuple[list[float], Clipper]:
    """How far each step moves a parameter whose gradients have these norms; None is no gradient."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = kind([weight], lr=1.0, fused=fused)
    clipper = Clipper(optimizer, **{"max_norm": INF, **options})
    moved = []
    for norm in norms:
        before = weight.detach().clone()
        weight.grad = None if norm is None else torch.tensor([0.6, 0.8]) * norm
        optimizer.step()
        moved.append(round(float((weight.detach() - before).norm()), 4))
        assert not hasattr(optimizer, "found_inf")
        assert not hasattr(optimizer, "grad_scale")
        assert (weight.grad is None) == (norm is None)
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
def test_steps_above_the_limit_are_skipped(limit: Any, scope: Scope, fused: bool) -> None:
    moved, clipper = steps_with([1.0, 9.0, 5.0, 6.0, 2.0], fused, max_norm=3.0, scope=scope, skip_above=limit)
    assert moved == pytest.approx([1.0, 0.0, 3.0, 0.0, 2.0], abs=1e-4)
    assert [(r.step, r.skipped) for r in clipper.history] == [*enumerate([False, True, False, True, False])]
    assert clipper.history.summary().skipped == 2


@fused_or_not
@pytest.mark.parametrize(
    ("norms", "skipped", "options"),
    [
        # The tighter threshold clips a step that is taken all the same.
        ([20.0, 20.0], [1, 0], {"max_norm": 2.0, "max_skips": 1}),
        # A step that is not finite is never taken instead, and says nothing about how many were skipped.
        ([9.0, 9.0, INF, INF, 1.0], [1, 1, 1, 1, 0], {"max_skips": 2, "nonfinite": "skip"}),
        ([9.0, 9.0, NAN, NAN, 1.0], [1, 1, 1, 1, 0], {"max_skips": 2, "nonfinite": "skip"}),
        ([9.0, 9.0, INF, INF, 1.0], [1, 1, 1, 1, 0], {"max_skips": 2}),
        ([9.0, NAN, 9.0, 9.0], [1, 0, 1, 0], {"max_skips": 2}),
        # Each step has a limit of its own.
        ([5.0] * 3, [0, 1, 0], {"skip_above": lambda step: [9.0, 1.0, 9.0][step]}),
        ([5.0] * 3, [0, 1, 0], {"skip_above": Answering(9.0, 1.0, 9.0)}),
        ([None], [0], {"skip_above": Answering(0.0)}),
    ],
)
def test_which_steps_are_skipped(norms: Any, skipped: Any, options: dict[str, Any], fused: bool) -> None:
    moved, clipper = steps_with(norms, fused, **{"skip_above": 5.0, **options})
    assert [r.skipped for r in clipper.history] == skipped
    most = min(options.get("max_norm", INF), 5.0)
    expected = [0.0 if s or norm is None else min(norm, most) for norm, s in zip(norms, skipped, strict=True)]
    if NAN not in norms[: -sum(skipped)]:
        assert moved == pytest.approx(expected, abs=1e-3)


@fused_or_not
def test_after_max_skips_the_next_one_is_taken_clipped_with_one_warning(fused: bool, everywhere: str) -> None:
    norms = [1.0, 20.0, 20.0, 20.0, 20.0, 20.0, 20.0, 1.0, 20.0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        moved, clipper = steps_with(norms, fused, max_norm=7.0, skip_above=5.0, max_skips=2)
    assert moved == pytest.approx([1.0, 0.0, 0.0, 5.0, 0.0, 0.0, 5.0, 1.0, 0.0], abs=1e-3)
    assert [r.skipped for r in clipper.history] == [distance == 0 for distance in moved]
    assert clipper.history[3].clip_coef == pytest.approx(0.25)
    assert [r.max_norm for r in clipper.history] == [7.0, INF, INF, 5.0, INF, INF, 5.0, 7.0, INF]
    messages = [str(w.message) for w in caught]
    if everywhere == "accelerator" and fused:
        assert messages == []  # a warning would have to wait
    else:
        assert len(messages) == 1
        assert "step 3 was taken, clipped to 5" in messages[0]


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


def test_with_zero_a_gradient_that_groups_share_counts_once() -> None:
    weights = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=1.0)
    clipper = Clipper(optimizer, INF, scope="group", nonfinite="zero", skip_above=6.0)
    weights[0].grad = weights[1].grad = torch.tensor([3.0, 4.0, NAN])
    optimizer.step()
    assert not last_of(clipper).skipped
    assert weights[1].tolist() == [-3.0, -4.0, 0.0]


# The loss


def with_losses(
    losses: Sequence[float | None], fused: bool = False, **options: Any
) -> tuple[list[int], Clipper]:
    """Which steps with these losses, and gradients of norm 1, move a parameter."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)
    clipper = Clipper(optimizer, INF, **options)
    moves = []
    for loss in losses:
        before = weight.detach().clone()
        weight.grad = torch.tensor([0.6, 0.8])
        clipper.loss = loss if loss is None else torch.tensor(loss, dtype=torch.float64)
        optimizer.step()
        moves.append(int(not torch.equal(weight, before)))
        assert torch.equal(weight.grad, torch.tensor([0.6, 0.8]))
    return moves, clipper


@fused_or_not
@pytest.mark.parametrize(
    "limit", [5.0, lambda step: 5.0, Answering(5.0)], ids=["number", "callable", "object"]
)
def test_steps_whose_loss_is_above_the_limit_are_skipped(limit: Any, fused: bool) -> None:
    moves, clipper = with_losses([1.0, 9.0, 5.0, -9.0, 6.0, NAN, INF], fused, skip_loss_above=limit)
    assert moves == [1, 0, 1, 1, 0, 1, 0]
    assert [r.skipped for r in clipper.history] == [not moved for moved in moves]
    assert [r.loss for r in clipper.history][:5] == [1.0, 9.0, 5.0, -9.0, 6.0]


def test_a_limit_that_follows_the_losses() -> None:
    losses = [1.0, 1.1, 0.9, 1.0, 1.1, 30.0, 1.0, 1.2]
    moves, clipper = with_losses(losses, skip_loss_above=RollingSigma(warmup=3))
    assert moves == [1, 1, 1, 1, 1, 0, 1, 1]
    learned = clipper.state_dict()["skip_loss_above"]["all"]["norms"]
    assert learned == [loss for loss in losses if loss < 30]


def test_norm_and_loss_are_counted_separately() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper = Clipper(optimizer, INF, skip_above=5.0, skip_loss_above=5.0, max_skips=2)
    skipped = []
    for norm, loss in [(9, 1), (1, 9), (9, 9), (9, 1), (1, 9), (1, 9), (1, 9), (9, 9), (9, 1), (9, 1)]:
        weight.grad = torch.tensor([0.6, 0.8]) * norm
        clipper.loss = loss
        optimizer.step()
        skipped.append(int(last_of(clipper).skipped))
    # Each of the two reasons has its own row; either one is enough to skip.
    assert skipped == [1, 1, 1, 1, 1, 1, 0, 1, 1, 0]
    assert last_of(clipper).clip_coef == pytest.approx(5 / 9)
    assert clipper.history[6].clip_coef == 1.0


@fused_or_not
def test_after_max_skips_a_step_is_taken_in_spite_of_its_loss(fused: bool) -> None:
    with (
        pytest.warns(UserWarning, match="step 3 was taken though its loss is 9: 2 steps .* `skip_loss_above`")
        if (not fused)
        else warnings.catch_warnings()
    ):
        moves, _ = with_losses([1.0, 9.0, 9.0, 9.0, 9.0], fused, skip_loss_above=5.0, max_skips=2)
    assert moves == [1, 0, 0, 1, 0]


def test_a_step_without_a_loss_is_refused_before_anything_changes() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper = Clipper(optimizer, 0.1, skip_loss_above=RollingSigma())
    for _ in range(2):  # the loss of a step is not that of the next one
        weight.grad = torch.tensor([3.0, 4.0])
        before = weight.detach().clone()
        with pytest.raises(RuntimeError, match=r"`skip_loss_above` .*clipper\.loss = loss"):
            optimizer.step()
        assert torch.equal(weight, before)
        assert torch.equal(weight.grad, torch.tensor([3.0, 4.0]))
        clipper.loss = 1.0
        optimizer.step()
    assert len(clipper.history) == 2


def test_the_loss_of_a_closure_counts() -> None:
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    clipper = Clipper(optimizer, INF, skip_loss_above=20.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        clipper.loss = loss
        return loss

    optimizer.step(closure)
    assert last_of(clipper).skipped
    assert weight.tolist() == [3.0, 4.0]


def test_a_round_of_several_optimizers_is_skipped_by_its_loss() -> None:
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=1.0) for weight in weights]
    clipper = Clipper(optimizers, INF, skip_loss_above=5.0)
    for loss in (9.0, 1.0):
        for weight in weights:
            weight.grad = torch.ones(1)
        clipper.loss = loss
        for optimizer in optimizers:
            optimizer.step()
    assert [weight.item() for weight in weights] == [-1.0, -1.0]
    assert [r.skipped for r in clipper.history] == [True, False]


def test_a_resumed_run_goes_on_with_what_the_losses_taught() -> None:
    losses = [1.0, 1.1, 0.9, 1.0, 30.0]
    options: dict[str, Any] = {"skip_loss_above": RollingSigma(warmup=3), "max_skips": 2}
    _, clipper = with_losses(losses, **options)
    state = clipper.state_dict()
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    resumed = Clipper(optimizer, INF, **options)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    for loss in (30.0, 30.0):
        weight.grad = torch.ones(2)
        resumed.loss = loss
        optimizer.step()
    assert [r.skipped for r in resumed.history][-3:] == [True, True, False]
    without = Clipper(torch.optim.SGD([weight], lr=1.0), INF)
    with pytest.raises(ValueError, match="holds what a `skip_loss_above` has learned"):
        without.load_state_dict(state)
    del state["skip_loss_above"], state["skips"]["skip_loss_above"]  # as of an earlier version
    resumed.load_state_dict(state)
    assert resumed.state_dict()["skip_loss_above"] == {"all": RollingSigma(warmup=3).state_dict()}


def test_lbfgs_cannot_skip_by_its_loss() -> None:
    with pytest.raises(ValueError, match="`skip_loss_above` does not work with LBFGS"):
        Clipper(torch.optim.LBFGS([nn.Parameter(torch.zeros(1))]), 1.0, skip_loss_above=1.0)


def test_gradients_of_a_skipped_step_stay_as_they_are_if_on_clip_raises() -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)

    def refuse(record: Record) -> None:
        raise KeyError(record.step)

    Clipper(optimizer, 1.0, skip_above=2.0, on_clip=refuse)
    with pytest.raises(KeyError, match="0"):
        optimizer.step()
    assert (weight.grad.tolist(), weight.tolist()) == ([3.0, 4.0], [0.0, 0.0])
