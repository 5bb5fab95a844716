"""Rules other than a threshold for the norm, and AdaGC, in a Clipper."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from clipper_helpers import INF, NAN, Net, backward, everything, fused_or_not, sgd
from helpers import bits, last_of, randn, with_gradients
from torch import Tensor, nn
from torch.amp import GradScaler

import torchclip
from torchclip import AdaGC, Adaptive, BlockRMS, Clipper, Value, kernel
from torchclip._core import gather
from torchclip._core.accelerator import AcceleratorBatch
from torchclip.clipper import Scope
from torchclip.history import Record

pytestmark = pytest.mark.usefixtures("kernel_on_and_off", "small_ones_too")

WAYS: dict[str, tuple[Any, Callable[[Sequence[Tensor]], object]]] = {
    "Value": (Value(0.5), lambda ps: torchclip.clip_grad_value_(ps, 0.5)),
    "Adaptive": (Adaptive(0.1), lambda ps: torchclip.clip_grad_adaptive_(ps, 0.1)),
    "BlockRMS": (BlockRMS(0.3), lambda ps: torchclip.clip_grad_rms_(ps, 0.3)),
}
each_way_of_clipping = pytest.mark.parametrize("name", WAYS)


@each_way_of_clipping
@pytest.mark.parametrize(
    ("listens", "scope", "fused"),
    [(False, "global", False), (False, "parameter", True), (True, "group", False), (True, "global", True)],
)
def test_a_run_is_that_of_the_function_before_each_step(
    listens: bool, scope: Scope, name: str, fused: bool
) -> None:
    way, function = WAYS[name]
    models = [Net(), Net()]
    plain, clipped = (torch.optim.Adam(m.parameters(), lr=0.05, fused=fused) for m in models)
    seen: list[Record] = []
    clipper = Clipper(clipped, way, scope=scope, on_clip=seen.append if listens else None)
    norms = []
    for step in range(5):
        for model, optimizer in zip(models, (plain, clipped), strict=True):
            backward(model, optimizer, step)
        before = float(
            torchclip.get_total_norm([p.grad for p in models[0].parameters() if p.grad is not None])
        )
        function(list(models[0].parameters()))
        after = float(
            torchclip.get_total_norm([p.grad for p in models[0].parameters() if p.grad is not None])
        )
        norms.append((before, after))
        plain.step()
        clipped.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert bits(a) == bits(b)
        assert bits(a.grad) == bits(b.grad)  # type: ignore[arg-type]
    assert [r.total_norm for r in clipper.history] == pytest.approx([before for before, _ in norms])
    assert [r.total_norm * r.clip_coef for r in clipper.history] == pytest.approx(
        [after for _, after in norms]
    )
    assert clipper.history.summary().clipped == 5
    assert all(r.max_norm == INF for r in clipper.history)
    assert seen == (list(clipper.history) if listens else [])


@each_way_of_clipping
def test_what_needs_no_clipping_is_not_clipped(name: str) -> None:
    way, _ = WAYS[name]
    (weight,) = with_gradients([torch.full((2,), 1e-4)], [torch.ones(2)])
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper = Clipper(optimizer, way)
    optimizer.step()
    assert (last_of(clipper).clip_coef, last_of(clipper).clipped) == (1.0, False)


@fused_or_not
@each_way_of_clipping
def test_groups_with_their_own_max_norm_are_left_out(name: str, fused: bool) -> None:
    way, function = WAYS[name]
    grads = [randn(4, 3, seed=i, scale=10) for i in range(3)]
    first, second, third = with_gradients([g.clone() for g in grads], [torch.ones(4, 3)] * 3)
    (alone,) = with_gradients([grads[0].clone()], [torch.ones(4, 3)])
    function([alone])
    groups: list[dict[str, Any]] = [
        {"params": [first]},
        {"params": [second], "max_norm": None},
        {"params": [third], "max_norm": 2.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, fused=fused)
    clipper = Clipper(optimizer, way)
    optimizer.step()
    assert bits(first.grad) == bits(alone.grad)
    assert bits(second.grad) == bits(grads[1])
    assert float(third.grad.norm()) == pytest.approx(2.0, rel=1e-5)
    after = math.hypot(*(float(p.grad.norm()) for p in (first, second, third)))
    assert last_of(clipper).total_norm * last_of(clipper).clip_coef == pytest.approx(after)
    assert last_of(clipper).max_norm == 2.0


@fused_or_not
@each_way_of_clipping
@pytest.mark.parametrize("unscales", [False, True])
def test_with_a_grad_scaler(unscales: bool, name: str, fused: bool) -> None:
    way, function = WAYS[name]
    grad = randn(4, 3, scale=10)
    weight, alone = with_gradients([None, grad.clone()], [torch.ones(4, 3)] * 2)
    function([alone])
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)
    clipper = Clipper(optimizer, way)
    scaler = GradScaler("cpu", init_scale=1024.0)
    weight.grad = grad * scaler.scale(torch.tensor(1.0))
    if unscales:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    torch.testing.assert_close(weight.detach(), 1.0 - alone.grad)
    torch.testing.assert_close(weight.grad, alone.grad)
    assert last_of(clipper).total_norm == pytest.approx(float(grad.norm()))


@fused_or_not
@each_way_of_clipping
def test_an_exception_from_on_clip_calls_the_step_off(name: str, fused: bool) -> None:
    weight = with_gradients([torch.full((2, 2), 9.0)], [torch.ones(2, 2)])[0]
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)
    grad, before = weight.grad, everything(optimizer)

    def stop(record: Record) -> None:
        assert weight.grad is grad
        assert (weight.grad == 9).all()
        raise KeyboardInterrupt

    clipper = Clipper(optimizer, WAYS[name][0], on_clip=stop)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert weight.grad is grad
    assert (weight.grad == 9).all()
    assert everything(optimizer) == before
    assert clipper.last is None


@each_way_of_clipping
def test_what_on_clip_changes_is_clipped(name: str) -> None:
    way, function = WAYS[name]
    weight, alone = with_gradients(
        [torch.full((2, 2), 9.0), torch.full((2, 2), 90.0)], [torch.ones(2, 2)] * 2
    )
    function([alone])
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper = Clipper(optimizer, way, on_clip=lambda _: weight.grad.mul_(10))
    optimizer.step()
    torch.testing.assert_close(weight.grad, alone.grad)
    assert last_of(clipper).total_norm == pytest.approx(180.0)


@fused_or_not
@pytest.mark.parametrize("value", [INF, NAN])
@each_way_of_clipping
def test_what_is_not_finite_is_treated_as_ever(name: str, value: float, fused: bool) -> None:
    for policy in ("skip", "zero", "error"):
        weight = with_gradients([torch.tensor([[value, 3.0]])], [torch.ones(1, 2)])[0]
        optimizer = torch.optim.SGD([weight], lr=1.0, fused=fused)
        clipper = Clipper(optimizer, WAYS[name][0], nonfinite=policy)
        if policy == "error":
            with pytest.raises(RuntimeError, match="non-finite"):
                optimizer.step()
            continue
        optimizer.step()
        assert weight.isfinite().all()
        assert last_of(clipper).skipped == (policy == "skip")
        assert last_of(clipper).nonfinite
        assert bool((weight == 1).all()) == (policy == "skip")


def test_weights_that_are_nan_give_a_coefficient_that_is() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, NAN], [1.0, 1.0]]))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    clipper = Clipper(optimizer, Adaptive(0.1))
    weight.grad = torch.full((2, 2), 9.0)
    optimizer.step()
    record = last_of(clipper)
    assert (record.total_norm, record.nonfinite) == (18.0, False)
    assert math.isnan(record.clip_coef)


def test_steps_without_gradients() -> None:
    optimizer = sgd([None, None])
    clipper = Clipper(optimizer, Value(1.0))
    optimizer.step()
    assert clipper.last == (0, 0.0, INF, 1.0, False, False, False, None)


def test_a_users_own_way() -> None:
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


@pytest.mark.parametrize("kind", [Value, Adaptive, BlockRMS])
def test_classes_and_states(kind: Any) -> None:
    with pytest.raises(TypeError, match=f"the class {kind.__name__}; pass an object of it"):
        Clipper(sgd([torch.ones(1)]), kind)
    with pytest.raises(TypeError, match="`skip_above`"):
        Clipper(sgd([torch.ones(1)]), 1.0, skip_above=kind(0.1))
    optimizer = sgd([torch.ones(1)])
    clipper = Clipper(optimizer, kind(0.1))
    assert f"max_norm={kind(0.1)!r}, norm_type" in repr(clipper)
    optimizer.step()
    state = clipper.state_dict()
    other = Clipper(sgd([torch.ones(1)]), kind(0.1))
    other.load_state_dict(state)
    assert other.state_dict() == state


# AdaGC


@pytest.mark.parametrize("scope", ["global", "group", "parameter"])
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


def test_adagc_resumes_and_leaves_out_groups_with_their_own() -> None:
    def make() -> tuple[Net, torch.optim.SGD, Clipper]:
        model = Net()
        first, *others = model.parameters()
        groups: list[dict[str, Any]] = [{"params": others}, {"params": [first], "max_norm": None}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        return model, optimizer, Clipper(optimizer, AdaGC(warmup=2))

    model, optimizer, clipper = make()
    for step in range(3):
        backward(model, optimizer, step)
        optimizer.step()
    resumed, its_optimizer, its_clipper = make()
    resumed.load_state_dict(model.state_dict())
    its_clipper.load_state_dict(clipper.state_dict())
    for each, its in ((model, optimizer), (resumed, its_optimizer)):
        backward(each, its, 3)
        its.step()
    assert its_clipper.state_dict() == clipper.state_dict()
    assert [bits(p) for p in resumed.parameters()] == [bits(p) for p in model.parameters()]
    assert set(clipper.thresholds) == {"group 0, parameter 0", "group 0, parameter 1"}


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
            monkeypatch.setattr(gather, "_local", AcceleratorBatch)
        optimizers[0].step()
    assert shared.grad.tolist() == pytest.approx([1.5, 2.0])  # the joint norm is 13
    assert other.grad.tolist() == pytest.approx([6.0])


def test_adagc_over_a_group_of_ranks_is_refused_in_its_name() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchclip._core.mesh.as_groups", lambda group: [group])
        with pytest.raises(ValueError, match="`group` has no meaning with AdaGC"):
            Clipper(optimizer, AdaGC(), group=object())  # type: ignore[arg-type]
