"""One clipping, and the function that is told of it."""

from typing import Any

import pytest
import torch
from clipper_helpers import fused_or_not, grad_norms, sgd, two_groups
from helpers import last_of

from torchclip import Clipper
from torchclip.history.records import Record

pytestmark = pytest.mark.usefixtures("kernel_on_and_off", "small_ones_too")


@fused_or_not
def test_the_record_of_a_step(fused: bool) -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])], fused=fused)
    seen: list[tuple[Record, list[float]]] = []
    clipper = Clipper(optimizer, 1.0, on_clip=lambda r: seen.append((r, [*clipper.norms().values()])))
    assert clipper.last is None
    optimizer.step()
    optimizer.step()
    assert [record for record, _ in seen] == list(clipper.history)
    record, norms = seen[0]
    assert record[:8] == (0, 5.0, 1.0, pytest.approx(0.2), True, False, False, None)  # type: ignore[comparison-overlap]
    assert (record.clipped_norm, norms) == (pytest.approx(1.0), pytest.approx([1.0]))  # type: ignore[comparison-overlap]
    assert clipper.last is clipper.history[-1]
    assert (last_of(clipper).step, last_of(clipper).total_norm) == (1, pytest.approx(1.0))


@pytest.mark.parametrize("fused", [False, True])
def test_an_exception_from_on_clip_calls_the_step_off_with_clipped_gradients(fused: bool) -> None:
    optimizer = two_groups(fused, max_norm=2.0)  # with two coefficients a fused step has them in place
    values = [p.tolist() for group in optimizer.param_groups for p in group["params"]]

    def refuse(record: Record) -> None:
        raise KeyError(record.step)

    clipper = Clipper(optimizer, 1.0, on_clip=refuse)
    for _ in range(2):
        with pytest.raises(KeyError, match="0"):
            optimizer.step()
        assert grad_norms(optimizer) == pytest.approx([1.0, 2.0], rel=1e-5)
    assert [p.tolist() for group in optimizer.param_groups for p in group["params"]] == values
    assert (clipper.last, clipper.state_dict()["steps"]) == (None, 0)


@fused_or_not
def test_gradients_stay_clipped_though_the_step_would_have_clipped_them(fused: bool) -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])], fused=fused)

    def refuse(record: Record) -> None:
        raise KeyError(record.step)

    Clipper(optimizer, 1.0, on_clip=refuse)
    for _ in range(2):
        with pytest.raises(KeyError, match="0"):
            optimizer.step()
        assert grad_norms(optimizer) == pytest.approx([1.0], rel=1e-5)
        assert not hasattr(optimizer, "grad_scale")


def test_what_on_clip_does_to_gradients_is_not_measured_again() -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])])
    clipper = Clipper(optimizer, 1.0, on_clip=lambda _: optimizer.param_groups[0]["params"][0].grad.mul_(7))
    optimizer.step()
    assert grad_norms(optimizer) == pytest.approx([7.0])
    assert last_of(clipper)[1:4] == (5.0, 1.0, pytest.approx(0.2))  # type: ignore[comparison-overlap]
    assert last_of(clipper).clipped_norm == pytest.approx(1.0)


def spoilt(optimizer: Any, group: int, value: float) -> None:
    optimizer.param_groups[group]["params"][0].grad[0] = value


@pytest.mark.parametrize("policy", ["propagate", "error", "skip", "zero"])
def test_exempt_groups_count_only_where_they_are_not_finite(policy: Any) -> None:
    optimizer = two_groups(max_norm=None)
    clipper = Clipper(optimizer, 1.0, nonfinite=policy, skip_above=6.0)
    optimizer.step()
    assert last_of(clipper)[1:7] == (5.0, 1.0, pytest.approx(0.2), True, False, False)  # type: ignore[comparison-overlap]
    assert grad_norms(optimizer) == pytest.approx([1.0, 10.0])
    spoilt(optimizer, 1, float("nan"))
    if policy == "error":
        with pytest.raises(RuntimeError, match=r"param_groups\[1\]\['params'\]\[0\]"):
            optimizer.step()
        return
    optimizer.step()
    record = last_of(clipper)
    assert (record.total_norm, record.nonfinite, record.skipped) == (  # type: ignore[comparison-overlap]
        pytest.approx(1.0),
        True,
        policy == "skip",
    )


def test_if_all_groups_are_exempt_all_are_recorded() -> None:
    optimizer = two_groups(max_norm=None)
    optimizer.param_groups[0]["max_norm"] = None
    clipper = Clipper(optimizer, 1.0)
    optimizer.step()
    assert last_of(clipper)[1:5] == (pytest.approx(125**0.5), float("inf"), 1.0, False)  # type: ignore[comparison-overlap]
