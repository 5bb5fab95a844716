"""Clipper with a GradScaler: norms and thresholds are those of the unscaled gradients, whatever is fused."""

import pytest
import torch
from clipper_helpers import NAN, fused_or_not
from helpers import last_of, with_gradients
from torch.amp import GradScaler

import torchclip
from torchclip import Clipper

pytestmark = pytest.mark.usefixtures("each_way")


def sgd(fused: bool) -> torch.optim.SGD:
    return torch.optim.SGD(with_gradients([torch.zeros(2), torch.zeros(1)]), lr=1.0, fused=fused)


def scaled_step(optimizer: torch.optim.Optimizer, unscales: bool = False) -> None:
    """Takes a step with the gradients that a scaled backward pass would have made."""
    scaler = GradScaler("cpu", init_scale=1024.0)
    for parameter, grad in zip(optimizer.param_groups[0]["params"], ([3.0, 4.0], [12.0]), strict=True):
        parameter.grad = torch.tensor(grad) * scaler.scale(torch.tensor(1.0))
    if unscales:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)


@fused_or_not
def test_user_code_sees_the_norms_of_unscaled_gradients_and_a_norm_of_order_0(fused: bool) -> None:
    optimizer = sgd(fused)
    seen: list[list[float]] = []
    clipper = Clipper(optimizer, 1.0, norm_type=0, on_clip=lambda _: seen.append([*clipper.norms().values()]))
    scaled_step(optimizer)
    assert (last_of(clipper).total_norm, seen) == (3.0, [[2.0, 1.0]])


@pytest.mark.parametrize("waits", [True, False])
def test_skip_looks_at_the_norm_where_the_scaler_found_nothing(
    waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not waits:  # as on an accelerator
        monkeypatch.setattr(torchclip._core.memory, "on_host", lambda tensors: False)
    optimizer = sgd(True)

    def spoil(*_: object) -> None:  # as the gradients of another rank would spoil the norm
        optimizer.param_groups[0]["params"][1].grad.fill_(NAN)

    hook = optimizer.register_step_pre_hook(spoil)
    clipper = Clipper(optimizer, 1.0, nonfinite="skip")
    scaled_step(optimizer)
    assert [p.tolist() for p in optimizer.param_groups[0]["params"]] == [[0.0, 0.0], [0.0]]
    assert (last_of(clipper).skipped, last_of(clipper).nonfinite) == (True, True)
    hook.remove()
    scaled_step(optimizer)
    assert not last_of(clipper).skipped
    assert optimizer.param_groups[0]["params"][1].tolist() == pytest.approx([-12 / 13])


@pytest.mark.parametrize("norm_type", [2.0, 3.0])
def test_a_fused_step_without_any_gradient(norm_type: float) -> None:
    optimizer = sgd(True)
    clipper = Clipper(optimizer, 1.0, norm_type=norm_type)
    optimizer.zero_grad()
    scaler = GradScaler("cpu")
    scaler.scale(torch.tensor(1.0))
    scaler.step(optimizer)
    assert last_of(clipper)[:9] == (0, 0.0, 1.0, 1.0, False, False, False, None, 0.0)


@pytest.mark.parametrize("unscales", [False, True])
def test_after_a_fused_step_that_failed_the_next_one_is_not_scaled_twice(unscales: bool) -> None:
    optimizer = sgd(fused=True)
    clipper = Clipper(optimizer, 1.0)

    def fail(*_: object) -> None:
        raise ArithmeticError

    hook = optimizer.register_step_pre_hook(fail)  # after the one that clips
    with pytest.raises(ArithmeticError):
        scaled_step(optimizer)
    hook.remove()
    scaled_step(optimizer, unscales=unscales)
    assert last_of(clipper).total_norm == pytest.approx(13)
    weights = [w for parameter in optimizer.param_groups[0]["params"] for w in parameter.tolist()]
    assert weights == pytest.approx([-3 / 13, -4 / 13, -12 / 13])
    assert not vars(optimizer).keys() & {"grad_scale", "found_inf"}
