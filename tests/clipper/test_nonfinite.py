"""The policies for gradients that are not finite."""

from typing import Any

import pytest
import torch
from clipper_helpers import INF, NAN, Net, backward, everything, gradients, train
from helpers import bits, grad_of, interrupted_sgd, last_of, with_gradients
from torch import Tensor, nn

from torchclip import Clipper, Percentile
from torchclip.clipper import Nonfinite, Scope

pytestmark = pytest.mark.usefixtures("each_way_everywhere")


@pytest.mark.parametrize(("scope", "fused"), [("global", False), ("global", True), ("parameter", False)])
def test_error_names_the_parameters_and_changes_nothing(scope: Scope, fused: bool) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1, fused=fused)
    clipper = Clipper(optimizer, Percentile(50, max_norm=0.5), scope=scope, nonfinite="error")
    train(model, optimizer, range(1))
    backward(model, optimizer, 1)
    grad_of(model.inner.weight)[0, 0], grad_of(model.inner.weight)[1, 1] = INF, NAN

    def all_of_it() -> Any:
        return everything(optimizer), [bits(g) for g in gradients(optimizer)], str(clipper.state_dict())

    before = all_of_it()
    with pytest.raises(RuntimeError, match=r"inner\.weight of shape \(6, 4\) \(1 inf, 1 nan\)") as caught:
        optimizer.step()
    assert "outer" not in str(caught.value)
    assert "nonfinite='skip'" in str(caught.value)
    assert all_of_it() == before


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


def test_elements_stay_0_if_the_threshold_then_raises_an_error() -> None:
    def failing(step: int) -> float:
        raise ArithmeticError(step)

    values = torch.tensor([3.0, NAN, -4.0, INF])
    weights = with_gradients([values, values.to_sparse()])
    optimizer = torch.optim.SGD(weights, lr=1.0)
    Clipper(optimizer, failing, nonfinite="zero")
    with pytest.raises(ArithmeticError):
        optimizer.step()
    for weight in weights:
        assert weight.grad.to_dense().tolist() == [3.0, 0.0, -4.0, 0.0]
        assert weight.tolist() == [0.0] * 4


def test_what_is_refused_is_refused_before_elements_become_0() -> None:
    (weight,) = with_gradients([torch.tensor([3.0, NAN])])
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper = Clipper(optimizer, 1.0, nonfinite="zero", skip_loss_above=1.0)
    with pytest.raises(RuntimeError, match=r"clipper\.loss = loss"):
        optimizer.step()
    assert grad_of(weight).isnan().any()
    clipper.loss = 0.5
    optimizer.param_groups[0]["max_norm"] = -1.0
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['max_norm'\]"):
        optimizer.step()
    assert grad_of(weight).isnan().any()


@pytest.mark.parametrize("scope", ["global", "group", "parameter"])
@pytest.mark.parametrize("left", [[], [0.0]])
def test_gradients_of_which_only_zeros_are_left_are_no_observation(left: list[float], scope: Scope) -> None:
    (weight,) = with_gradients([torch.tensor([INF, *left, NAN])])
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper = Clipper(optimizer, Percentile(50), scope=scope, nonfinite="zero", skip_above=Percentile(50))
    for grad, learned in (([INF, *left, NAN], 0), ([0.0] * (2 + len(left)), 1)):
        weight.grad = torch.tensor(grad)
        optimizer.step()
        record, state = last_of(clipper), clipper.state_dict()
        assert (record.nonfinite, record.skipped, record.clipped_norm) == (not learned, False, 0.0)
        learners = [*state["thresholds"].values(), *state["skip_above"].values()]
        assert [each["seen"] for each in learners] == [learned, learned]


def test_zeros_that_are_left_of_a_shared_gradient_are_no_observation() -> None:
    first, second = with_gradients([torch.tensor([INF, 0.0]), torch.zeros(2)])
    second.grad = first.grad
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=1.0)
    clipper = Clipper(optimizer, 1.0, scope="group", nonfinite="zero", skip_above=Percentile(50))
    optimizer.step()
    assert [each["seen"] for each in clipper.state_dict()["skip_above"].values()] == [0]


def test_a_new_gradient_that_a_hook_makes_within_a_skipped_step_stays() -> None:
    first, second = with_gradients([torch.tensor([3.0, INF]), torch.tensor([2.0])])
    optimizer = torch.optim.SGD([first, second], lr=1.0, weight_decay=0.1)
    Clipper(optimizer, 1.0, nonfinite="skip")
    optimizer.register_step_pre_hook(lambda *_: setattr(second, "grad", torch.tensor([7.0])))
    optimizer.step()
    assert (first.grad.tolist(), second.grad.tolist()) == ([3.0, INF], [7.0])
    assert first.tolist() == [0.0, 0.0]


def test_an_optimizers_own_zero_grad_is_called_and_stays() -> None:
    (weight,) = with_gradients([torch.tensor([3.0, INF])])
    optimizer = torch.optim.SGD([weight], lr=1.0)
    called: list[bool] = []
    optimizer.zero_grad = own = called.append  # type: ignore[method-assign, assignment]
    Clipper(optimizer, 1.0, nonfinite="skip")
    optimizer.register_step_post_hook(lambda o, *_: o.zero_grad(False))
    optimizer.step()
    assert called == [False]
    assert weight.grad is not None
    assert optimizer.zero_grad is own


def test_after_a_skipped_step_that_failed_old_gradients_do_not_come_back_beside_new_ones() -> None:
    first, second = with_gradients([torch.tensor([3.0, INF]), torch.tensor([1.0])])
    optimizer = torch.optim.SGD([first, second], lr=1.0)
    clipper = Clipper(optimizer, 1.0, nonfinite="skip")
    with interrupted_sgd():
        optimizer.step()
    first.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert (last_of(clipper).total_norm, second.grad) == (5.0, None)
