"""Kinds of limits for steps that are skipped, and their warning; the rest is in the random trainings."""

import re
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from clipper_helpers import INF, NAN, Answering, fused_or_not
from torch import nn

from torchclip import Clipper

pytestmark = pytest.mark.usefixtures("everywhere", "small_ones_too")
by_norm_or_loss = pytest.mark.parametrize("argument", ["skip_above", "skip_loss_above"])


def moves_with(values: Sequence[float], argument: str, fused: bool, limit: Any, **options: Any) -> list[int]:
    """Which steps move a parameter, if their gradients have these norms, or if these are their losses."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)
    clipper = Clipper(optimizer, INF, **{argument: limit}, **options)
    moves = []
    for value in values:
        before = weight.detach().clone()
        weight.grad = torch.tensor([0.6, 0.8]) * (value if argument == "skip_above" else 1.0)
        clipper.loss = torch.tensor(value, dtype=torch.float64)
        optimizer.step()
        moves.append(int(not torch.equal(weight, before)))
    assert [record.skipped for record in clipper.history] == [not moved for moved in moves]
    return moves


@fused_or_not
@by_norm_or_loss
@pytest.mark.parametrize(
    "limit",
    [5.0, lambda step: [9.0, 5.0, 5.0, 5.0, 1.0, 1.0][step], Answering(5.0), "5", torch.tensor(5.0)],
    ids=["number", "callable", "object", "text", "tensor"],
)
def test_steps_above_the_limit_are_skipped(limit: Any, argument: str, fused: bool) -> None:
    values = [1.0, 9.0, 5.0, 6.0, 0.5]
    assert moves_with(values, argument, fused, limit) == [1, 0, 1, 0, 1]
    if argument == "skip_loss_above":  # NaN is not above any number
        assert moves_with([*values, NAN], argument, fused, limit) == [1, 0, 1, 0, 1, 1]


@fused_or_not
@by_norm_or_loss
def test_after_max_skips_the_next_one_is_taken_with_one_warning(
    argument: str, fused: bool, everywhere: str
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        moves = moves_with([1.0, *[9.0] * 6, 1.0, 9.0], argument, fused, 5.0, max_skips=2)
    assert moves == [1, 0, 0, 1, 0, 0, 1, 1, 0]
    messages = [str(warning.message) for warning in caught]
    if everywhere == "accelerator" and fused and argument == "skip_above":
        assert messages == []  # a warning would have to wait
        return
    (message,) = messages
    said = "step 3 was taken though its loss is 9: 2 steps .* raise `skip_loss_above`"
    if argument == "skip_above":
        said = "step 3 was taken, clipped to 5, though its norm is 9: 2 steps .* raise `skip_above`"
    assert re.search(said, message)
