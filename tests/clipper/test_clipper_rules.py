"""Rules other than a threshold for the norm, and AdaGC, in a Clipper."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from clipper_helpers import NAN, Net, each_scope, everything, fused_or_not, sgd, train
from helpers import as_on_an_accelerator, bits, last_of, randn, with_gradients
from torch import Tensor, nn
from torch.amp import GradScaler

import torchclip
from torchclip import AdaGC, Adaptive, BlockRMS, Clipper, Value, kernel
from torchclip.clipper import Scope
from torchclip.history import Record

pytestmark = pytest.mark.usefixtures("kernel_on_and_off", "small_ones_too")

WAYS: dict[str, tuple[Any, Callable[[Sequence[Tensor]], object]]] = {
    "Value": (Value(0.5), lambda ps: torchclip.clip_grad_value_(ps, 0.5)),
    "Adaptive": (Adaptive(0.1), lambda ps: torchclip.clip_grad_adaptive_(ps, 0.1)),
    "BlockRMS": (BlockRMS(0.3), lambda ps: torchclip.clip_grad_rms_(ps, 0.3)),
}
each_rule = pytest.mark.parametrize("name", WAYS)


@fused_or_not
@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_an_adaptive_run_is_that_of_the_function_before_each_step(scope: Scope, fused: bool) -> None:
    models = [Net(), Net()]
    plain, clipped = (torch.optim.Adam(m.parameters(), lr=0.05, fused=fused) for m in models)
    seen: list[Record] = []
    clipper = Clipper(clipped, Adaptive(0.1), scope=scope, on_clip=seen.append)
    norms: list[float] = []

    def clip() -> None:
        parameters = [*models[0].parameters()]
        norms.append(float(torchclip.get_total_norm([p.grad for p in parameters if p.grad is not None])))
        torchclip.clip_grad_adaptive_(parameters, 0.1)
        norms.append(float(torchclip.get_total_norm([p.grad for p in parameters if p.grad is not None])))

    train(models[0], plain, range(5), clip)
    train(models[1], clipped, range(5))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert (bits(a), bits(a.grad)) == (bits(b), bits(b.grad))  # type: ignore[arg-type]
    assert [r.total_norm for r in clipper.history] == pytest.approx(norms[::2])
    assert [r.clipped_norm for r in clipper.history] == pytest.approx(norms[1::2])
    assert seen == list(clipper.history)


@fused_or_not
@each_rule
@pytest.mark.parametrize("scale", ["none", "unscaled", "scaled"])
def test_groups_with_their_own_max_norm_and_a_grad_scaler(name: str, fused: bool, scale: str) -> None:
    rule, function = WAYS[name]
    grads = [randn(4, 3, seed=i, scale=10) for i in range(3)]
    (alone,) = with_gradients([grads[0].clone()], [torch.ones(4, 3)])
    function([alone])
    weights = with_gradients([None] * 3, [torch.ones(4, 3) for _ in grads])
    groups: list[dict[str, Any]] = [
        {"params": [weights[0]]},
        {"params": [weights[1]], "max_norm": None},
        {"params": [weights[2]], "max_norm": 2.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, fused=fused)
    clipper = Clipper(optimizer, rule)
    scaler = GradScaler("cpu", init_scale=1024.0, enabled=scale != "none")
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = grad * scaler.scale(torch.tensor(1.0))
    if scale == "unscaled":
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    torch.testing.assert_close(weights[0].grad, alone.grad)
    torch.testing.assert_close(weights[0].detach(), 1.0 - alone.grad)
    torch.testing.assert_close(weights[1].grad, grads[1])
    assert float(weights[2].grad.norm()) == pytest.approx(2.0, rel=1e-5)
    after = math.hypot(*(float(p.grad.norm()) for p in weights[::2]))
    record = last_of(clipper)
    assert record.total_norm == pytest.approx(math.hypot(*(float(g.norm()) for g in grads[::2])))
    assert record.total_norm * record.clip_coef == pytest.approx(after)
    assert record.max_norm == 2.0


def test_weights_that_are_nan_give_a_coefficient_that_is() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, NAN], [1.0, 1.0]]))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    clipper = Clipper(optimizer, Adaptive(0.1))
    weight.grad = torch.full((2, 2), 9.0)
    optimizer.step()
    record = last_of(clipper)
    assert (record.total_norm, record.nonfinite) == (18.0, False)
    assert math.isnan(record.clip_coef)


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


def test_complex_gradients_have_no_order_to_clip_by_value() -> None:
    optimizer = sgd([torch.tensor([3.0 + 4j])])
    Clipper(optimizer, Value(1.0))
    before = everything(optimizer)
    with pytest.raises(TypeError, match="complex"):
        optimizer.step()
    assert everything(optimizer) == before


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


@each_scope
def test_adagc_is_for_single_parameters(scope: Scope) -> None:
    first, second = with_gradients([torch.tensor([3.0, 4.0]), torch.tensor([12.0])])
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=1.0, fused=scope == "global")
    clipper = Clipper(optimizer, AdaGC(relative=1.5, beta=0.5, warmup=1, max_norm=6.5), scope=scope)
    optimizer.step()
    assert [first.grad.tolist(), second.grad.tolist()] == [pytest.approx([1.5, 2.0]), pytest.approx([6.0])]
    first.grad, second.grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    optimizer.step()
    assert [first.grad.tolist(), second.grad.tolist()] == [pytest.approx([2.25, 3.0]), pytest.approx([9.0])]
    names = ["group 0, parameter 0", "group 1, parameter 0"]
    assert list(clipper.thresholds) == names
    assert [clipper.thresholds[n].state_dict()["gamma"] for n in names] == pytest.approx([3.125, 7.5])


def test_adagc_skips_groups_with_their_own() -> None:
    first, second = with_gradients([torch.tensor([3.0, 4.0]), torch.tensor([12.0])])
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": [second], "max_norm": None}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    clipper = Clipper(optimizer, AdaGC(warmup=2, max_norm=1.0))
    optimizer.step()
    assert [*clipper.thresholds] == ["group 0, parameter 0"]
    assert float(first.grad.norm()) == pytest.approx(1.0)
    assert second.grad.tolist() == [12.0]


@pytest.mark.parametrize("on_host", [True, False])
def test_adagc_counts_a_parameter_of_two_optimizers_once_in_its_warm_up(
    on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, other = with_gradients([torch.tensor([3.0, 4.0]), torch.tensor([12.0])])
    optimizers = [torch.optim.SGD([shared], lr=1.0), torch.optim.SGD([shared, other], lr=1.0)]
    Clipper(optimizers, AdaGC(warmup=2, max_norm=6.5))
    with contextlib.ExitStack() as stack:
        if not on_host:
            stack.enter_context(kernel.disabled())
            as_on_an_accelerator(monkeypatch)
        optimizers[0].step()
    assert shared.grad.tolist() == pytest.approx([1.5, 2.0])  # the joint norm is 13
    assert other.grad.tolist() == pytest.approx([6.0])
