"""One clipping, and user code in the middle of it; random trainings change gradients there in every way."""

from typing import Any

import pytest
import torch
from clipper_helpers import Answering, everything, fused_or_not, grad_norms, sgd, two_groups
from helpers import last_of, with_gradients

from torchclip import Clipper

pytestmark = pytest.mark.usefixtures("kernel_on_and_off", "small_ones_too")


@fused_or_not
def test_the_record_of_a_step(fused: bool) -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])], fused=fused)
    seen: list[Any] = []
    clipper = Clipper(optimizer, 1.0, on_clip=lambda record: seen.append((record, clipper.norms())))
    assert clipper.last is None
    optimizer.step()
    optimizer.step()
    assert [record for record, _ in seen] == list(clipper.history)
    assert seen[0] == (
        (0, 5.0, 1.0, pytest.approx(0.2), True, False, False, None),
        {"param_groups[0]['params'][0]": 5.0},
    )
    assert clipper.last is clipper.history[-1]
    assert (last_of(clipper).step, last_of(clipper).total_norm) == (1, pytest.approx(1.0))


@fused_or_not
def test_a_group_that_comes_in_the_middle_of_a_step_is_clipped(fused: bool) -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])], fused=fused)
    (late,) = with_gradients([torch.tensor([0.0, 12.0])])

    def add(_: object) -> None:
        if len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": [late], "max_norm": 0.5})

    clipper = Clipper(optimizer, 1.0, on_clip=add)
    optimizer.step()
    assert grad_norms(optimizer) == pytest.approx([1.0, 0.5], rel=1e-5)
    assert last_of(clipper).total_norm == pytest.approx(13.0)


@fused_or_not
def test_thresholds_stay_those_that_were_decided_upon(fused: bool) -> None:
    optimizer = two_groups(fused, max_norm=2.0)
    loosen = lambda _: optimizer.param_groups[1].update(max_norm=None)  # noqa: E731
    clipper = Clipper(optimizer, 1.0, on_clip=loosen)
    optimizer.step()
    assert grad_norms(optimizer) == pytest.approx([1.0, 2.0], rel=1e-5)
    optimizer.step()
    assert last_of(clipper).max_norm == 1.0


def test_gradients_that_appear_again_and_again_are_refused_before_anything_changes() -> None:
    parameters = with_gradients([torch.tensor([3.0, 4.0]), None, None, None])
    optimizer = torch.optim.SGD(parameters, lr=1.0)

    class Giving(Answering):
        def update(self, norm: float) -> Any:
            next(p for p in parameters if p.grad is None).grad = torch.tensor([6.0, 8.0])
            return super().update(norm)

    clipper = Clipper(optimizer, Giving(1.0), scope="parameter")
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match=r"group 0, parameter 2.*set gradients before optimizer\.step"):
        optimizer.step()
    assert everything(optimizer) == before
    assert grad_norms(optimizer) == [5.0, 10.0, 10.0]
    assert clipper.last is None
    assert [t.asked for t in clipper.thresholds.values()] == [[5.0], [10.0], [], []]  # type: ignore[attr-defined]
