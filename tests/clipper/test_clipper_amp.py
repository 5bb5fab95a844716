"""Clipper with a GradScaler: norms and thresholds are those of the unscaled gradients, whatever is fused."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
import torch
from clipper_helpers import INF, NAN, fused_or_not
from helpers import bits, interrupted_sgd, last_of, randn, with_gradients
from torch import Tensor, nn
from torch.amp import GradScaler

import torchclip
from torchclip import Clipper, Percentile
from torchclip.clipper import Nonfinite, Scope

pytestmark = pytest.mark.usefixtures("each_way")

SCALE = 1024.0
unscaled_or_not = pytest.mark.parametrize("unscales", [False, True])
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
    steps: int,
    dtype: torch.dtype = torch.bfloat16,
    unscales: bool = False,
    before_step: Callable[[], object] | None = None,
    overflows: Collection[int] = (),
) -> list[float]:
    """Trains with autocast, with overflows in given steps; returns the scale of each step."""
    scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=3)
    scales = []
    for step in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = ((model(randn(8, 4, seed=step)) - randn(8, 2, seed=step + 99)) ** 2).mean()
        scaler.scale(loss * (INF if step in overflows else 1.0)).backward()
        if unscales:
            scaler.unscale_(optimizer)
        if before_step is not None:
            before_step()
        scaler.step(optimizer)
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
        scales.append(scaler.get_scale())
        scaler.update()
    return scales


def all_bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[bytes]:
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return [bits(t) for t in [*model.parameters(), *state]]


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
    overflows = {4, 5, 9}
    scales = train(models[0], plain, 12, dtype, True, clip, overflows)
    assert train(models[1], clipped, 12, dtype, unscales, None, overflows) == scales
    assert len(set(scales)) > 2
    taken = [record for record in clipper.history if not record.skipped]
    assert [r.total_norm for r in taken] == pytest.approx([n for n in norms if math.isfinite(n)], rel=1e-3)
    assert all(r.clipped and r.max_norm == 0.3 for r in taken)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


def scaled_step(
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler,
    grads: Sequence[Tensor | None],
    unscales: bool = False,
) -> None:
    """Takes a step with the gradients that a scaled backward pass would have made."""
    scale = scaler.scale(torch.tensor(1.0))
    for parameter, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        parameter.grad = None if grad is None else grad * scale
    if unscales:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def sgd(fused: bool, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(with_gradients([torch.zeros(2), torch.zeros(1)]), lr=1.0, fused=fused, **options)


GRADS = [torch.tensor([3.0, 4.0]), torch.tensor([12.0])]


@pytest.mark.parametrize(
    ("max_norm", "fused", "unscales", "scope"),
    [
        (lambda step: 2.0 + step, False, False, "global"),
        (Percentile(0), False, False, "group"),
        (Percentile(0), True, False, "global"),
        (Percentile(0), True, True, "parameter"),
        (INF, True, False, "parameter"),
    ],
)
def test_norms_and_thresholds_are_of_the_unscaled_gradients(
    max_norm: Any, fused: bool, unscales: bool, scope: Scope
) -> None:
    runs = []
    for scale in (1.0, SCALE):
        optimizer = sgd(fused)
        seen = []
        clipper = Clipper(optimizer, max_norm, scope=scope, on_clip=lambda _: seen.append(clipper.norms()))  # noqa: B023
        scaler = GradScaler("cpu", init_scale=scale)
        for factor in (1.0, 2.0):
            scaled_step(optimizer, scaler, [g * factor for g in GRADS], unscales)
        state = [(p.detach(), p.grad) for p in optimizer.param_groups[0]["params"]]
        runs.append((list(clipper.history), clipper.state_dict()["thresholds"], seen, state))
    (history, thresholds, seen, state), of_scaled = runs
    assert [r.total_norm for r in history] == pytest.approx([13.0, 26.0])
    for expected, actual in zip(history, of_scaled[0], strict=True):
        assert actual[:-1] == pytest.approx(expected[:-1], rel=1e-6)  # which takes no None for a loss
    assert of_scaled[1:3] == (thresholds, seen)
    torch.testing.assert_close(of_scaled[3], state, rtol=1e-5, atol=0)


@fused_or_not
@pytest.mark.parametrize("norm_type", [0, 3])
def test_orders_that_random_trainings_lack(norm_type: float, fused: bool) -> None:
    optimizer = sgd(fused)
    clipper = Clipper(optimizer, 1.0, norm_type=norm_type)
    scaled_step(optimizer, GradScaler("cpu", init_scale=SCALE), GRADS)
    expected = float(torchclip.get_total_norm(GRADS, norm_type))
    assert last_of(clipper).total_norm == pytest.approx(expected, rel=1e-6)


@fused_or_not
@pytest.mark.parametrize("max_norm", [0.0, 1e-32])
def test_coefficients_beyond_float32(max_norm: Any, fused: bool) -> None:
    optimizer = sgd(fused)
    clipper = Clipper(optimizer, max_norm)
    scaled_step(optimizer, GradScaler("cpu", init_scale=2.0**20), GRADS)
    assert last_of(clipper).clip_coef == pytest.approx(max_norm / 13)
    expected = [g * max_norm / 13 for g in GRADS]
    for parameter, grad in zip(optimizer.param_groups[0]["params"], expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=0)


@pytest.mark.parametrize("nonfinite", ["error", "zero"])
@pytest.mark.parametrize(("fused", "value"), [(False, INF), (True, NAN)])
def test_overflows_are_the_scalers_to_treat(fused: bool, value: float, nonfinite: Nonfinite) -> None:
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)
    clipper = Clipper(optimizer, Percentile(50, max_norm=1.0), nonfinite=nonfinite)
    scaler = GradScaler("cpu", init_scale=SCALE)
    finite = [randn(*p.shape, seed=5) for p in model.parameters()]
    scaled_step(optimizer, scaler, finite)
    before, learned = all_bits(model, optimizer), clipper.state_dict()["thresholds"]
    spoiled = [g.clone() for g in finite]
    spoiled[2][0] = value
    scaled_step(optimizer, scaler, spoiled)
    assert all_bits(model, optimizer) == before
    assert clipper.state_dict()["thresholds"] == learned
    assert scaler.get_scale() == SCALE / 2
    assert [r.skipped for r in clipper.history] == ([False, True] if fused else [False])
    scaled_step(optimizer, scaler, finite)
    assert all_bits(model, optimizer) != before
    assert not last_of(clipper).skipped


@pytest.mark.parametrize("waits", [True, False])
def test_skip_looks_at_the_norm_where_the_scaler_found_nothing(
    waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not waits:  # as on an accelerator
        monkeypatch.setattr(torchclip._core.memory, "on_host", lambda tensors: False)
    optimizer = sgd(True)
    scaler = GradScaler("cpu", init_scale=SCALE)

    def spoil(*_: object) -> None:  # as the gradients of another rank would spoil the norm
        optimizer.param_groups[0]["params"][1].grad.fill_(NAN)

    hook = optimizer.register_step_pre_hook(spoil)
    clipper = Clipper(optimizer, 1.0, nonfinite="skip")
    scaled_step(optimizer, scaler, GRADS)
    assert [p.tolist() for p in optimizer.param_groups[0]["params"]] == [[0.0, 0.0], [0.0]]
    assert (last_of(clipper).skipped, last_of(clipper).nonfinite) == (True, True)
    hook.remove()
    scaled_step(optimizer, scaler, GRADS)
    assert not last_of(clipper).skipped
    assert optimizer.param_groups[0]["params"][1].tolist() == pytest.approx([-12 / 13])


@fused_or_not
def test_without_scaling_the_policies_are_as_ever(fused: bool) -> None:
    optimizer = sgd(fused)
    clipper = Clipper(optimizer, 1.0, nonfinite="skip")
    scaled_step(optimizer, GradScaler("cpu", enabled=False), [torch.tensor([3.0, NAN]), None])
    assert last_of(clipper).skipped
    assert optimizer.param_groups[0]["params"][0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("norm_type", [2.0, 3.0])
def test_a_fused_step_without_any_gradient(norm_type: float | str) -> None:
    optimizer = sgd(True)
    clipper = Clipper(optimizer, 1.0, norm_type=norm_type)
    optimizer.zero_grad()
    scaler = GradScaler("cpu")
    scaler.scale(torch.tensor(1.0))
    scaler.step(optimizer)
    assert clipper.last == (0, 0.0, 1.0, 1.0, False, False, False, None)


@unscaled_or_not
@pytest.mark.parametrize("value", [1.0, INF])
def test_after_a_plain_step_that_failed_the_scalers_next_is_as_usual(unscales: bool, value: float) -> None:
    optimizer = torch.optim.SGD(
        with_gradients([torch.tensor([3.0, value]), torch.tensor([12.0])]), lr=1.0, fused=True
    )
    clipper = Clipper(optimizer, 1.0)
    with interrupted_sgd():
        optimizer.step()
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.data.zero_()
    scaled_step(optimizer, GradScaler("cpu", init_scale=SCALE), GRADS, unscales)
    assert last_of(clipper).total_norm == pytest.approx(13.0)
    assert optimizer.param_groups[0]["params"][0].tolist() == pytest.approx([-3 / 13, -4 / 13])
    assert not hasattr(optimizer, "grad_scale")


@pytest.mark.parametrize("next_one", ["scaler", "scaler, unscales", "plain"])
@pytest.mark.parametrize("max_norm", [1.0, 100.0])
def test_after_a_scalers_step_that_failed_the_next_is_as_usual_whatever_it_is(
    max_norm: float, next_one: str
) -> None:
    optimizer = sgd(True)
    clipper = Clipper(optimizer, max_norm)
    with interrupted_sgd():
        scaled_step(optimizer, GradScaler("cpu", init_scale=SCALE), GRADS)
    if next_one == "plain":
        for parameter, grad in zip(optimizer.param_groups[0]["params"], GRADS, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
    else:
        scaler = GradScaler("cpu", init_scale=SCALE / 4)
        scaled_step(optimizer, scaler, GRADS, next_one.endswith("unscales"))
    coef = min(1.0, max_norm / 13)
    assert last_of(clipper).total_norm == pytest.approx(13.0)
    assert optimizer.param_groups[0]["params"][0].tolist() == pytest.approx([-3 * coef, -4 * coef])
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
