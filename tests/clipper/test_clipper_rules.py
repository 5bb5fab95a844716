"""Rules other than a threshold for the norm, and AdaGC, in a Clipper."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from clipper_helpers import sgd, two_groups
from helpers import last_of, with_gradients
from torch import Tensor

from torchclip import AdaGC, Adaptive, BlockRMS, Clipper, Value

pytestmark = pytest.mark.usefixtures("kernel_on_and_off", "small_ones_too")


def test_a_users_own_rule() -> None:
    class Signs:
        def clip_(self, parameters: Sequence[Tensor], grad_scale: Tensor | None = None) -> None:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.sign_()

    optimizer = sgd([torch.tensor([3.0, -4.0])])
    clipper = Clipper(optimizer, Signs())
    optimizer.step()
    assert optimizer.param_groups[0]["params"][0].tolist() == [-1.0, 1.0]
    assert last_of(clipper).clip_coef == pytest.approx(2**0.5 / 5)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Value(100.0), "clip_value"),
        (lambda: BlockRMS(100.0), "max_rms"),
        (lambda: Adaptive(100.0), "clip_factor"),
    ],
)
def test_a_rule_has_a_repr_and_its_threshold_may_change(make: Callable[[], Any], name: str) -> None:
    rule = make()
    optimizer = torch.optim.SGD(with_gradients([torch.ones(2)], [torch.ones(2)]), lr=0.1)
    clipper = Clipper(optimizer, rule)
    assert f"max_norm={rule!r}, norm_type" in repr(clipper)
    optimizer.step()
    setattr(rule, name, 1e-6)
    optimizer.step()
    assert [record.clipped for record in clipper.history] == [False, True]


# AdaGC


def test_adagc_has_a_threshold_for_each_parameter_whatever_the_scope() -> None:
    optimizer = two_groups(max_norm=None)
    optimizer.add_param_group({"params": with_gradients([torch.ones(2), torch.ones(3)])})
    clipper = Clipper(optimizer, AdaGC())
    optimizer.step()
    assert [*clipper.thresholds] == ["group 0, parameter 0", "group 2, parameter 0", "group 2, parameter 1"]
