"""The policies for gradients that are not finite."""

from typing import Any

import pytest
import torch
from clipper_helpers import (
    INF,
    NAN,
    Net,
    backward,
    everything,
    fused_or_not,
    gradients,
    sgd,
    train,
)
from helpers import bits, grad_of, interrupted_sgd, last_of, with_gradients
from torch import Tensor, nn

from torchclip import AdaGC, Clipper, Percentile, RollingSigma, ZScore
from torchclip.clipper import Nonfinite, Scope

pytestmark = pytest.mark.usefixtures("each_way_everywhere")


each_kind_of_step = pytest.mark.parametrize(
    ("scope", "fused"), [("global", False), ("global", True), ("parameter", False)]
)


def with_spoiled_step(fused: bool, **options: Any) -> tuple[Net, torch.optim.AdamW, Clipper]:
    """An optimizer after a regular step, with some gradients that are not finite."""
    model = Net()
    named = list(model.named_parameters())
    groups = [{"params": named[:1]}, {"params": named[1:]}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, fused=fused)
    clipper = Clipper(optimizer, Percentile(50, max_norm=0.5), **options)
    train(model, optimizer, range(1))
    backward(model, optimizer, 1)
    grad = grad_of(model.inner.weight)
    grad[0, 0], grad[1, 1] = INF, NAN
    return model, optimizer, clipper


@each_kind_of_step
def test_error_names_the_parameters_and_changes_nothing(scope: Scope, fused: bool) -> None:
    _, optimizer, clipper = with_spoiled_step(fused, scope=scope, nonfinite="error")
    before = everything(optimizer), [bits(g) for g in gradients(optimizer)], str(clipper.state_dict())
    with pytest.raises(RuntimeError, match=r"inner\.weight of shape \(6, 4\) \(1 inf, 1 nan\)") as caught:
        optimizer.step()
    assert "outer" not in str(caught.value)
    assert "nonfinite='skip'" in str(caught.value)
    after = everything(optimizer), [bits(g) for g in gradients(optimizer)], str(clipper.state_dict())
    assert after == before


@pytest.mark.parametrize("nonfinite", ["error", "zero"])
def test_lbfgs_with_the_policies_that_it_can_have(nonfinite: Nonfinite) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([weight], lr=0.1)
    clipper = Clipper(optimizer, 1.0, nonfinite=nonfinite)

    def closure() -> Tensor:
        optimizer.zero_grad()
        (weight[0] ** 2 + torch.sqrt(weight[1] - 1)).backward()  # of infinite slope
        return torch.tensor(1.0)

    if nonfinite == "error":
        with pytest.raises(RuntimeError, match="non-finite"):
            optimizer.step(closure)
        assert weight.tolist() == [1.0, 1.0]
    else:
        optimizer.step(closure)
        assert weight.isfinite().all()
        assert clipper.history[0].nonfinite


@fused_or_not
@pytest.mark.parametrize("set_to_none", [False, True])
def test_gradients_that_a_hook_zeroes_after_a_skipped_step_stay_so(set_to_none: bool, fused: bool) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)
    optimizer.register_step_post_hook(lambda o, *_: o.zero_grad(set_to_none))
    clipper = Clipper(optimizer, 1.0, nonfinite="skip")
    for value in (3.0, INF, 3.0):
        (weight * torch.tensor([value, 4.0])).sum().backward()
        optimizer.step()
        assert (weight.grad is None) if set_to_none else (grad_of(weight) == 0).all()
    assert [record.skipped for record in clipper.history] == [False, True, False]
    assert weight.tolist() == pytest.approx([-1.2, -1.6])
    assert "zero_grad" not in vars(optimizer)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_zeroing_gradients_within_a_skipped_step_changes_no_parameter(set_to_none: bool) -> None:
    weights = with_gradients([torch.tensor([INF]), torch.tensor([2.0])], [torch.ones(1), torch.ones(1)])
    optimizer = torch.optim.SGD(weights, lr=1.0, weight_decay=0.1)
    Clipper(optimizer, 1.0, nonfinite="skip")
    optimizer.register_step_pre_hook(lambda o, *_: o.zero_grad(set_to_none))
    optimizer.step()
    assert [w.item() for w in weights] == [1.0, 1.0]
    assert [w.grad for w in weights] == ([None, None] if set_to_none else [0.0, 0.0])


def test_a_gradient_that_a_hook_sets_in_a_skipped_step_stays_beside_the_others() -> None:
    first, second = with_gradients([torch.tensor([3.0, INF]), torch.tensor([2.0])])
    optimizer = torch.optim.SGD([first, second], lr=1.0)
    Clipper(optimizer, 1.0, nonfinite="skip")
    optimizer.register_step_pre_hook(lambda *_: setattr(second, "grad", torch.tensor([7.0])))
    optimizer.step()
    assert (first.grad.tolist(), second.grad.tolist()) == ([3.0, INF], [7.0])


def test_after_a_skipped_step_that_failed_old_gradients_do_not_come_back_beside_new_ones() -> None:
    first, second = with_gradients([torch.tensor([3.0, INF]), torch.tensor([1.0])])
    optimizer = torch.optim.SGD([first, second], lr=1.0)
    clipper = Clipper(optimizer, 1.0, nonfinite="skip")
    with interrupted_sgd():
        optimizer.step()
    first.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert (last_of(clipper).total_norm, second.grad) == (5.0, None)


def test_lbfgs_cannot_skip() -> None:
    with pytest.raises(ValueError, match="LBFGS"):
        Clipper(torch.optim.LBFGS([nn.Parameter(torch.ones(1))]), 1.0, nonfinite="skip")


@pytest.mark.parametrize("norm_type", [0, -1, "-inf"])
def test_policies_need_a_norm_that_shows_what_is_not_finite(norm_type: float | str) -> None:
    optimizer = sgd([torch.tensor([3.0, INF])])
    for policy in ("error", "skip", "zero"):
        message = rf"`nonfinite='{policy}'`.*pass an order above 0.*'propagate'"
        with pytest.raises(ValueError, match=message):
            Clipper(optimizer, 1.0, norm_type=norm_type, nonfinite=policy)
    Clipper(optimizer, 1.0, norm_type=norm_type)


@pytest.mark.parametrize(
    ("max_norm", "policy"),
    [
        (lambda: 1.0, "propagate"),
        (lambda: 0.0, "propagate"),
        (lambda: 0.0, "zero"),
        (lambda: Percentile(10, window=3), "propagate"),
        (lambda: Percentile(10, window=3), "skip"),
        (lambda: ZScore(warmup=1), "zero"),
        (lambda: AdaGC(warmup=1), "skip"),
        (lambda: AdaGC(warmup=1), "zero"),
        (lambda: RollingSigma(warmup=2, window=3), "propagate"),
    ],
)
def test_norms_of_0_and_infinity_do_the_same_to_a_fused_step(max_norm: Any, policy: Nonfinite) -> None:
    """Its ``grad_scale`` may be infinite then."""
    moved: dict[bool, list[list[float]]] = {}
    histories: dict[bool, str] = {}
    for fused in (False, True):
        optimizer = sgd([torch.zeros(2)], fused=fused)
        clipper = Clipper(optimizer, max_norm(), nonfinite=policy)
        (weight,) = optimizer.param_groups[0]["params"]
        moved[fused] = []
        for value in (0.0, 1.0, 0.0, INF, 1.0, NAN, 2.0):
            weight.data.zero_()
            weight.grad = torch.tensor([value, 0.5])
            optimizer.step()
            moved[fused].append(weight.tolist())
        histories[fused] = str(list(clipper.history))
    assert moved[True] == [pytest.approx(step, rel=1e-6, abs=0, nan_ok=True) for step in moved[False]]
    assert histories[True] == histories[False]
