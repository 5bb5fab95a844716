"""Clipper with a GradScaler: norms and thresholds are those of the unscaled gradients, whatever is fused."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
import torch
from clipper_helpers import INF, NAN, fused_or_not
from helpers import last_of, randn, with_gradients
from torch import Tensor, nn
from torch.amp import GradScaler

import torchclip
from torchclip import Clipper

pytestmark = pytest.mark.usefixtures("each_way")

SCALE = 1024.0
KINDS: dict[str, Callable[[Any, bool], torch.optim.Optimizer]] = {
    "Adam": lambda ps, fused: torch.optim.Adam(ps, lr=0.05, fused=fused),
    "AdamW": lambda ps, fused: torch.optim.AdamW(ps, lr=0.05, fused=fused),
    "SGD": lambda ps, fused: torch.optim.SGD(ps, lr=0.1, momentum=0.9, fused=fused),
    "Adagrad": lambda ps, fused: torch.optim.Adagrad(ps, lr=0.1, fused=fused),
}


def make_model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    for i, parameter in enumerate(model.parameters()):
        parameter.data = randn(*parameter.shape, seed=i)
    return model


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype,
    unscales: bool,
    before_step: Callable[[], object] = lambda: None,
    overflows: Collection[int] = (4, 5, 9),
) -> list[float]:
    """Trains with autocast, with overflows in some steps; returns the scale of each step."""
    scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=3)
    scales = []
    for step in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = ((model(randn(8, 4, seed=step)) - randn(8, 2, seed=step + 99)) ** 2).mean()
        scaler.scale(loss * (INF if step in overflows else 1.0)).backward()
        if unscales:
            scaler.unscale_(optimizer)
        before_step()
        scaler.step(optimizer)
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
        scales.append(scaler.get_scale())
        scaler.update()
    return scales


@pytest.mark.parametrize(
    ("fused", "unscales", "dtype"),
    [(False, False, torch.float16), (True, False, torch.bfloat16), (True, True, torch.float16)],
)
@pytest.mark.parametrize("name", KINDS)
def test_the_run_is_that_of_unscaling_clipping_and_stepping(
    name: str, fused: bool, unscales: bool, dtype: torch.dtype
) -> None:
    models = [make_model(), make_model()]
    plain, clipped = KINDS[name](models[0].parameters(), False), KINDS[name](models[1].parameters(), fused)
    norms = []

    def clip() -> None:
        norms.append(float(torchclip.clip_grad_norm_(models[0].parameters(), 0.3)))

    clipper = Clipper(clipped, 0.3)
    scales = train(models[0], plain, dtype, True, clip)
    assert train(models[1], clipped, dtype, unscales) == scales
    assert len(set(scales)) > 2
    taken = [record for record in clipper.history if not record.skipped]
    assert [r.total_norm for r in taken] == pytest.approx([n for n in norms if math.isfinite(n)], rel=1e-3)
    assert all(r.clipped and r.max_norm == 0.3 for r in taken)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


GRADS = [torch.tensor([3.0, 4.0]), torch.tensor([12.0])]


def sgd(fused: bool) -> torch.optim.SGD:
    return torch.optim.SGD(with_gradients([torch.zeros(2), torch.zeros(1)]), lr=1.0, fused=fused)


def scaled_step(
    optimizer: torch.optim.Optimizer,
    grads: Sequence[Tensor] = GRADS,
    scale: float = SCALE,
    unscales: bool = False,
) -> None:
    """Takes a step with the gradients that a scaled backward pass would have made."""
    scaler = GradScaler("cpu", init_scale=scale)
    for parameter, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        parameter.grad = grad * scaler.scale(torch.tensor(1.0))
    if unscales:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)


@fused_or_not
@pytest.mark.parametrize("max_norm", [0.0, 1e-30, 1e-32])
@pytest.mark.parametrize("scale", [1.0, 2.0**20])
def test_coefficients_beyond_float32(scale: float, max_norm: float, fused: bool) -> None:
    optimizer = sgd(fused)
    clipper = Clipper(optimizer, max_norm)
    scaled_step(optimizer, [1e8 * g for g in GRADS] if scale == 1.0 else GRADS, scale)
    norm = last_of(clipper).total_norm
    assert last_of(clipper).clip_coef == pytest.approx(max_norm / norm)
    for parameter, grad in zip(optimizer.param_groups[0]["params"], GRADS, strict=True):
        torch.testing.assert_close(parameter.grad, grad * (max_norm / 13), rtol=1e-4, atol=0)


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


@fused_or_not
def test_a_group_without_gradients_has_no_part_in_the_record(fused: bool) -> None:
    optimizer = sgd(fused)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "max_norm": 3.0})
    clipper = Clipper(optimizer, 100.0)
    scaled_step(optimizer)
    assert last_of(clipper)[1:4] == (pytest.approx(13.0), 100.0, 1.0)  # type: ignore[comparison-overlap]
