"""Which gradients are clipped together, with which threshold; the rest is in the random trainings."""

from typing import Any

import pytest
import torch
from clipper_helpers import (
    NAN,
    Answering,
    each_scope,
    everything,
    grad_norms,
    sgd,
    two_groups,
)

from torchclip import Clipper, Percentile
from torchclip.clipper import Scope

pytestmark = pytest.mark.usefixtures("each_way")


@each_scope
def test_groups_may_come_later_and_have_no_parameters(scope: Scope) -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])])
    groups = [*optimizer.param_groups]
    optimizer.param_groups.clear()
    clipper = Clipper(optimizer, Percentile(), scope=scope)
    optimizer.step()
    optimizer.param_groups.extend(groups)
    optimizer.add_param_group({"params": []})
    optimizer.step()
    assert [record.total_norm for record in clipper.history] == [0.0, 5.0]
    learned = [norm for each in clipper.thresholds.values() for norm in each.state_dict()["norms"]]
    assert learned == [5.0]


@each_scope
def test_a_callable_is_asked_once_a_step(scope: Scope) -> None:
    asked: list[int] = []
    optimizer = two_groups()
    Clipper(optimizer, lambda step: asked.append(step) or 1.0, scope=scope)  # type: ignore[func-returns-value]
    optimizer.step()
    optimizer.step()
    assert asked == [0, 1]


@pytest.mark.parametrize(
    ("options", "own", "error", "message"),
    [
        ({"max_norm": 1.0, "scope": "group"}, -1.0, ValueError, r"param_groups\[1\]\['max_norm'\]"),
        ({"max_norm": 1.0, "scope": "group"}, NAN, ValueError, r"param_groups\[1\]\['max_norm'\]"),
        ({"max_norm": 1.0}, "abc", TypeError, r"param_groups\[1\]\['max_norm'\]"),
        ({"max_norm": Answering(NAN)}, 1.0, ValueError, "Answering.update"),
        ({"max_norm": Answering(-1.0)}, 1.0, ValueError, "Answering.update"),
        ({"max_norm": Answering(None)}, 1.0, TypeError, "Answering.update"),
        ({"max_norm": lambda step: NAN}, 1.0, ValueError, r"max_norm\(0\)"),
        ({"max_norm": lambda step: -1.0}, 1.0, ValueError, r"max_norm\(0\)"),
        ({"max_norm": lambda step: "abc"}, 1.0, TypeError, r"max_norm\(0\)"),
        ({"max_norm": 1.0, "skip_above": Answering(NAN)}, 1.0, ValueError, r"update\(\)"),
        ({"max_norm": 1.0, "skip_above": lambda step: -1.0}, 1.0, ValueError, "skip_above"),
    ],
)
def test_impossible_thresholds_are_refused_before_anything_changes(
    options: dict[str, Any], own: Any, error: type[Exception], message: str
) -> None:
    optimizer = two_groups(max_norm=own)
    clipper = Clipper(optimizer, **options)
    before = everything(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert grad_norms(optimizer) == [5.0, 10.0]
    assert everything(optimizer) == before
    assert not hasattr(optimizer, "grad_scale")
    assert clipper.last is None
