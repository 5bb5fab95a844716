"""One clipping: nothing changes before all is decided, and user code in the middle of it is heeded."""

import math
from collections.abc import Callable, Mapping, Sequence
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
from torchclip.clipper import Nonfinite, Scope
from torchclip.clipper.scope import Snapshot
from torchclip.history import Record

pytestmark = pytest.mark.usefixtures("kernel_on_and_off", "one_thread", "small_ones_too")


@fused_or_not
@each_scope
@pytest.mark.parametrize("refuses", ["on_clip", "max_norm"])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
def test_a_step_that_is_called_off_changes_nothing(
    nonfinite: Nonfinite, refuses: str, scope: Scope, fused: bool
) -> None:
    optimizer = two_groups(fused)
    first, other = gradients(optimizer)
    other[0] = INF
    seen = []

    def refuse(argument: object) -> None:
        seen.append(other[0].item())
        raise KeyboardInterrupt

    options: dict[str, Any] = {"max_norm": 1.0, "scope": scope, "nonfinite": nonfinite, refuses: refuse}
    clipper = Clipper(optimizer, **options)
    before = everything(optimizer)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert seen == [INF]
    assert [first.tolist(), other.tolist()] == [[3.0, 4.0], [INF, 8.0]]
    assert everything(optimizer) == before
    assert (clipper.last, clipper.history.summary().steps) == (None, 0)


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


# User code in the middle of a step: the gradients are looked at again


def bigger(parameters: list[Any]) -> None:
    parameters[0].grad = parameters[0].grad * 10


def same_again(parameters: list[Any]) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()


def data_replaced(parameters: list[Any]) -> None:
    parameters[0].grad.data = parameters[0].grad.data * 10


def data_changed(parameters: list[Any]) -> None:
    parameters[0].grad.data.mul_(10)  # which bumps no version counter


def changed_in_place(parameters: list[Any]) -> None:
    parameters[0].grad.mul_(10)


def smaller(parameters: list[Any]) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.div_(100)


def resized(parameters: list[Any]) -> None:
    grad = parameters[0].grad
    values = grad.clone()
    grad.resize_(1 << 20).resize_(values.shape).copy_(values)


def given_other_memory(parameters: list[Any]) -> None:
    parameters[0].grad.set_(parameters[0].grad * 10)


def taken_away(parameters: list[Any]) -> None:
    parameters[0].grad = None


def all_taken_away(parameters: list[Any]) -> None:
    for parameter in parameters:
        parameter.grad = None


def appeared(parameters: list[Any]) -> None:
    parameters[2].grad = parameters[0].grad * 3


def shared(parameters: list[Any]) -> None:
    parameters[1].grad = parameters[0].grad


CHANGES = [
    bigger,
    same_again,
    data_replaced,
    data_changed,
    changed_in_place,
    smaller,
    resized,
    given_other_memory,
    taken_away,
    all_taken_away,
    appeared,
    shared,
]
LIMIT = 2.0


class Changing:
    """User code that changes the gradients when it is first called, and notes what they are then."""

    def __init__(self, parameters: list[Any], change: Callable[[list[Any]], None], scale: float) -> None:
        self.parameters, self.change, self.scale = parameters, change, scale
        self.left: list[Tensor | None] | None = None

    def __call__(self, *_: object) -> float:
        if self.left is None:
            self.change(self.parameters)
            self.left = [None if p.grad is None else p.grad.double() / self.scale for p in self.parameters]
        return LIMIT

    update = __call__

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def __deepcopy__(self, memo: object) -> "Changing":
        return self


def by_hand(gradients: Sequence[Tensor | None], apart: bool) -> tuple[float, list[float]]:
    """The norm of all gradients, counting each once, and what each is multiplied by."""
    distinct = {tuple(g.tolist()): float(g.norm()) for g in gradients if g is not None}
    total = math.hypot(*distinct.values())
    norms = [0.0 if g is None else float(g.norm()) if apart else total for g in gradients]
    return total, [min(1.0, LIMIT / norm) if norm else 1.0 for norm in norms]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("where", ["on_clip", "max_norm", "update"])
@pytest.mark.parametrize("scope", ["global", "parameter"])
@pytest.mark.parametrize("way", ["unfused", "fused", "unfused, scaler", "fused, scaler"])
def test_what_user_code_changes_in_the_middle_of_a_step_is_clipped(
    way: str, scope: Scope, where: str, change: Callable[[list[Any]], None]
) -> None:
    fused, scales = way.startswith("fused"), way.endswith("scaler")
    if fused and scales and change is shared:
        pytest.skip("torch's fused steps take the scale out of such a gradient twice, also without clipping")
    grads = [torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.5])]
    parameters = with_gradients([torch.zeros(2) for _ in grads])
    optimizer = torch.optim.SGD(parameters, lr=1.0, fused=fused)
    user = Changing(parameters, change, 1024.0 if fused and scales else 1.0)
    options: dict[str, Any] = (
        {"on_clip": user, "max_norm": LIMIT} if where == "on_clip" else {"max_norm": user}
    )
    if where == "max_norm":
        options["max_norm"] = lambda step: user()
    clipper = Clipper(optimizer, scope=scope, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scales)
    scaler.scale(torch.tensor(1.0))
    for parameter, scaled in zip(parameters, grads, strict=True):
        parameter.grad = scaled * (1024.0 if scales else 1.0)
    parameters[2].grad = None
    scaler.step(optimizer)
    assert user.left is not None
    total, coefs = by_hand(user.left, scope == "parameter")
    for parameter, grad, coef in zip(parameters, user.left, coefs, strict=True):
        expected = torch.zeros(2) if grad is None else (grad * coef).float()
        torch.testing.assert_close(parameter.detach(), -expected, rtol=1e-5, atol=0)
        assert (parameter.grad is None) == (grad is None)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=0)
    (record,) = clipper.history
    assert record.total_norm == pytest.approx(total, rel=1e-6)
    assert record.clip_coef == pytest.approx(min(coefs), rel=1e-5)
    assert record.clipped == (min(coefs) < 1)
    assert not hasattr(optimizer, "grad_scale")


@fused_or_not
@pytest.mark.parametrize("policy", ["error", "skip", "zero"])
@each_scope
def test_what_user_code_spoils_is_treated_as_any_gradient_that_is_not_finite(
    scope: Scope, policy: Nonfinite, fused: bool
) -> None:
    optimizer = two_groups(fused)
    first, second = gradients(optimizer)
    clipper = Clipper(
        optimizer, 1.0, scope=scope, nonfinite=policy, on_clip=lambda _: first.copy_(torch.tensor([NAN, 4.0]))
    )
    before = everything(optimizer)
    if policy == "error":
        with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[0\] of shape \(2,\) .*1 nan"):
            optimizer.step()
        assert clipper.last is None
    else:
        optimizer.step()
        assert (last_of(clipper).skipped, last_of(clipper).nonfinite) == (policy == "skip", True)
    if policy == "zero":
        joint = math.hypot(4.0, 10.0)
        expected = [4 / joint, 10 / joint] if scope == "global" else [1.0, 1.0]
        assert grad_norms(optimizer) == pytest.approx(expected, rel=1e-5)
    else:
        assert everything(optimizer) == before
        assert second.tolist() == [6.0, 8.0]


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
