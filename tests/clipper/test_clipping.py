"""One clipping: nothing changes before all is decided, and changes by user code are respected."""

from typing import Any

import pytest
import torch
from clipper_helpers import (
    Answering,
    everything,
    fused_or_not,
    grad_norms,
    gradients,
    sgd,
    two_groups,
)
from helpers import last_of, with_gradients

from torchclip import Clipper, Percentile, ZScore
from torchclip.clipper.scope import Snapshot
from torchclip.history import Record

pytestmark = pytest.mark.usefixtures("kernel_on_and_off", "one_thread", "small_ones_too")


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
def test_an_exception_from_on_clip_calls_the_step_off(fused: bool) -> None:
    optimizer = two_groups(fused)
    before = everything(optimizer)

    def stop(record: Record) -> None:
        raise KeyboardInterrupt

    Clipper(optimizer, 1.0, on_clip=stop)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert grad_norms(optimizer) == [5.0, 10.0]
    assert everything(optimizer) == before
    assert not hasattr(optimizer, "grad_scale")


# User code in the middle of a step; in the random trainings it changes gradients in every way


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

    def loosen(_: object) -> None:
        optimizer.param_groups[1]["max_norm"] = None

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


def test_without_user_code_nothing_is_measured_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    measure = Snapshot.measure

    def note(look: Snapshot) -> None:
        measured.append(1)
        measure(look)

    monkeypatch.setattr(Snapshot, "measure", note)
    for max_norm in (1.0, Percentile(), ZScore()):
        optimizer = two_groups()
        Clipper(optimizer, max_norm)
        optimizer.step()
    assert len(measured) == 3
    optimizer = two_groups()
    Clipper(optimizer, 1.0, on_clip=lambda _: None)
    optimizer.step()
    assert len(measured) == 5


def test_a_threshold_learns_from_the_first_look_and_on_clip_is_called_once() -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])])
    seen = []

    def on_clip(record: Record) -> None:
        seen.append(record.total_norm)
        gradients(optimizer)[0].mul_(10)

    clipper = Clipper(optimizer, Percentile(50), on_clip=on_clip)
    optimizer.step()
    assert seen == [5.0]
    assert clipper.thresholds["all"].state_dict()["norms"] == [5.0]
    assert (last_of(clipper).total_norm, last_of(clipper).max_norm) == (50.0, 5.0)
    assert grad_norms(optimizer) == pytest.approx([5.0])
