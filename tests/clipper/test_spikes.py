"""Steps that are skipped because their norm is above a limit."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from clipper_helpers import INF, NAN, Answering, fused_or_not
from helpers import interrupted_sgd, last_of
from torch import nn

from torchclip import Clipper, Percentile
from torchclip.clipper import Scope

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


@pytest.mark.parametrize("between", [False, True])
def test_a_step_that_failed_does_not_count_as_skipped(between: bool) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    clipper = Clipper(optimizer, INF, nonfinite="skip", skip_above=5.0, max_skips=1)
    weight.grad = torch.tensor([0.0, 9.0])
    with interrupted_sgd():
        optimizer.step()
    if between:  # a step that is skipped, too, but not because of the limit
        weight.grad = torch.tensor([0.0, INF])
        optimizer.step()
        weight.grad = torch.tensor([0.0, 9.0])
    optimizer.step()
    assert last_of(clipper).skipped
    assert not hasattr(optimizer, "found_inf")


@fused_or_not
def test_a_resumed_run_counts_on(fused: bool) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)
    weight.grad = torch.tensor([0.0, 9.0])
    state: Any = None
    for _ in range(3):
        with Clipper(optimizer, INF, skip_above=Percentile(0, max_norm=5.0), max_skips=2) as clipper:
            if state is not None:
                clipper.load_state_dict(state)
            weight.grad = torch.tensor([0.0, 9.0])
            optimizer.step()
            state = copy.deepcopy(clipper.state_dict())
    assert [r.skipped for r in clipper.history] == [True, True, False]
    assert state["skip_above"]["all"]["norms"] == [9.0, 9.0, 9.0]
