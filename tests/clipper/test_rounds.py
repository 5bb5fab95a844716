"""Several optimizers that step together: one norm, one record, whoever steps first.

The random trainings draw what users do with them; here are other optimizers, errors, steps in the backward
pass, and what stays alive.
"""

import gc
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from clipper_helpers import Net, loss_of
from helpers import interrupted_sgd, last_of
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer

from torchclip import AdaGC, Clipper, Percentile, Value
from torchclip.history.records import Record

pytestmark = pytest.mark.usefixtures("each_way")

OPTIMIZERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "plain": (lambda ps: SGD(ps, lr=0.05, momentum=0.9), lambda ps: AdamW(ps, lr=0.05)),
    "fused": (
        lambda ps: SGD(ps, lr=0.05, momentum=0.9, fused=True),
        lambda ps: AdamW(ps, lr=0.05, fused=True),
    ),
    "one fused": (lambda ps: SGD(ps, lr=0.05, momentum=0.9), lambda ps: AdamW(ps, lr=0.05, fused=True)),
}
if hasattr(torch.optim, "Muon"):  # since torch 2.9
    OPTIMIZERS["Muon"] = (
        lambda ps: torch.optim.Muon([p for p in ps if p.ndim == 2], lr=0.02),
        lambda ps: AdamW(ps, lr=0.05),
    )


class Training:
    """A model with two optimizers: one for the inner matrices, one for everything else."""

    def __init__(self, pair: str = "plain") -> None:
        self.model = Net()
        inner = [self.model.inner.weight, self.model.outer.weight]
        others = [p for p in self.model.parameters() if all(p is not each for each in inner)]
        first, second = OPTIMIZERS[pair]
        self.first, self.second = first(inner), second(others)
        self.optimizers = [self.first, self.second]

    def backward(self, step: int) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        (loss_of(self.model, step) * 3).backward()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def test_what_is_refused_when_it_is_made() -> None:
    free, taken = SGD([nn.Parameter(torch.ones(2))], lr=0.1), Training().second
    lbfgs = torch.optim.LBFGS([nn.Parameter(torch.ones(2))])
    Clipper(taken, 1.0)
    cases: list[tuple[Any, Any, Any, str]] = [
        ([free, taken], {}, ValueError, r"`optimizer` \(item 1 of the list\) already has a Clipper"),
        ([free, free], {}, ValueError, r"`optimizer` \(item 1 of the list\) is in the list twice"),
        ([], {}, ValueError, "empty list"),
        ([free, nn.Linear(1, 1)], {}, TypeError, r"`optimizer` \(item 1 of the list\) must be"),
        ([free, lbfgs], {}, ValueError, "`optimizer` includes LBFGS"),
        (lbfgs, {"nonfinite": "skip"}, ValueError, "`nonfinite.* does not work with LBFGS"),
        (lbfgs, {"skip_above": 5.0}, ValueError, "`skip_above.* does not work with LBFGS"),
        (lbfgs, {"skip_loss_above": 5.0}, ValueError, "`skip_loss_above.* does not work with LBFGS"),
        (free, {"model": nn.Linear(1, 1)}, ValueError, "`model` has none of the parameters"),
    ]
    for optimizers, options, error, message in cases:
        with pytest.raises(error, match=message):
            Clipper(optimizers, 1.0, **options)
        Clipper(free, 1.0).detach()  # none was taken


@pytest.mark.parametrize("pair", ["plain", "fused", "one fused"])
def test_a_scaler_that_unscales_too_late(pair: str) -> None:
    training = Training(pair)
    Clipper(training.optimizers, 0.5)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(training.model, 0)).backward()
    before = training.values()
    with pytest.raises(RuntimeError, match=r"scaler\.unscale_\(optimizer\)"):
        [*map(scaler.step, training.optimizers)]
    if pair == "fused":  # else the first one to step was unscaled in its step
        assert all(map(torch.equal, before, training.values()))


def test_what_tells_the_optimizers_apart() -> None:
    training = Training()
    clipper = Clipper(training.optimizers, Percentile(), scope="parameter", layers_every=1)
    training.backward(0)
    places = [f"optimizer 0, group 0, parameter {i}" for i in range(2)]
    assert list(clipper.thresholds)[:2] == places
    assert "optimizers[1].param_groups[0]['params'][0]" in clipper.norms()
    training.step()
    assert len(set(clipper.history.layers.names)) == 3
    clipper.detach()
    named = Clipper(
        training.optimizers, Percentile(), scope="parameter", nonfinite="error", model=training.model
    )
    names = {name for name, _ in training.model.named_parameters()}
    assert set(named.thresholds) == set(named.norms()) == names
    training.model.outer.weight.grad[0, 0] = float("nan")  # type: ignore[index]
    for optimizer in (training.second, training.first):
        with pytest.raises(RuntimeError, match=r"outer\.weight"):
            optimizer.step()


# The loss


def test_the_loss_of_a_round() -> None:
    training = Training()
    clipper = Clipper(training.optimizers, 0.5)
    assert clipper.loss is None
    for losses in ((1.0,), (), (1.5, torch.tensor(2.0, requires_grad=True))):
        training.backward(0)
        for loss in losses:
            clipper.loss = loss
        training.step()
        assert clipper.loss is None
    assert [record.loss for record in clipper.history] == [1.0, None, 3.5]
    with pytest.raises(TypeError, match="`loss` must be a number"):
        clipper.loss = "low"  # type: ignore[assignment]


@pytest.mark.parametrize("assigned", ["before backward", "after backward"])
def test_the_loss_of_a_step_that_a_scaler_skips_is_dropped(assigned: str) -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = SGD([weight], lr=0.1)
    clipper = Clipper(optimizer, 1.0)
    scaler = GradScaler("cpu", init_scale=4.0)
    for step, factor in enumerate([1.0, float("inf"), 1.0]):
        optimizer.zero_grad()
        for part in range(2):
            if assigned == "before backward":
                clipper.loss = 10.0 * step + part
            scaler.scale((weight**2).sum() * factor).backward()
            if assigned == "after backward":
                clipper.loss = 10.0 * step + part
        scaler.step(optimizer)
        scaler.update()
    assert [record.loss for record in clipper.history] == [1.0, 41.0]


def test_losses_are_added_where_a_backward_pass_replaces_gradients() -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = SGD([weight], lr=0.1)
    clipper = Clipper(optimizer, 1.0)
    for part in range(3):
        (grad,) = torch.autograd.grad((weight**2).sum(), weight, create_graph=True)
        weight.grad = grad if weight.grad is None else weight.grad + grad
        clipper.loss = float(part)
    optimizer.step()
    weight.grad = None
    assert last_of(clipper).loss == 3.0


# In the backward pass


def step_and_zero(held: "weakref.ref[Optimizer]", _: Tensor) -> None:
    optimizer = held()
    assert optimizer is not None
    optimizer.step()
    optimizer.zero_grad()


class InBackward(Training):
    """An optimizer for each parameter, which steps as soon as the gradient exists."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizers = [SGD([p], lr=0.05) for p in self.model.parameters()]
        for parameter, optimizer in zip(self.model.parameters(), self.optimizers, strict=True):
            # A reference from a parameter to its optimizer would be a cycle made by the test.
            hook = partial(step_and_zero, weakref.ref(optimizer))
            parameter.register_post_accumulate_grad_hook(hook)


@pytest.mark.parametrize("make", [lambda: 0.1, lambda: Percentile(50), lambda: Value(0.01)])
def test_optimizers_with_a_clipper_each_step_in_the_backward_pass_as_after_it(make: Any) -> None:
    training, after = InBackward(), Training()
    after.optimizers = [SGD([p], lr=0.05) for p in after.model.parameters()]
    clippers = [Clipper(each, make()) for each in (*training.optimizers, *after.optimizers)]
    for step in range(3):
        (loss_of(training.model, step) * 3).backward()
        after.backward(step)
        after.step()
    torch.testing.assert_close(training.values(), after.values(), rtol=1e-6, atol=1e-7)
    assert [len(clipper.history) for clipper in clippers] == [3] * 6


@pytest.mark.parametrize("options", [{"scope": "group"}, {"scope": "parameter"}, {"nonfinite": "skip"}])
def test_a_clipper_of_several_optimizers_refuses_steps_in_the_backward_pass(options: Any) -> None:
    training = InBackward()
    clipper = Clipper(training.optimizers, float("inf"), **options)
    before = training.values()
    with pytest.raises(RuntimeError, match=r"torchclip\.Clipper\(optimizer, max_norm\) for optimizer in"):
        loss_of(training.model, 0).backward()
    assert all(map(torch.equal, before, training.values()))
    assert len(clipper.history) == 0


def two_weights(**second: Any) -> tuple[list[Any], list[SGD]]:
    """Two parameters with gradients of ones, and an optimizer for each."""
    weights = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))]
    for weight in weights:
        weight.grad = torch.ones(4)
    return weights, [SGD(weights[:1], lr=1.0), SGD(weights[1:], lr=1.0, **second)]


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_a_gradient_may_go_in_a_round_that_the_kernel_does_not_take(first: int, is_sparse: bool) -> None:
    weights, optimizers = two_weights()
    table = nn.Parameter(torch.zeros(4, 3))
    ones = torch.ones(4, 6)[:, ::2]  # with gaps
    table.grad = ones.to_sparse(1) if is_sparse else ones
    optimizers[1].add_param_group({"params": [table]})
    clipped: list[Record] = []
    clipper = Clipper(optimizers, 1.0, on_clip=clipped.append)
    optimizers[first].step()
    table.grad = None
    optimizers[1 - first].step()
    assert clipped == list(clipper.history)
    assert last_of(clipper).total_norm == pytest.approx(math.sqrt(20.0))
    assert all(torch.equal(weight.data, weights[0].data) for weight in weights)


def test_a_round_is_not_skipped_if_a_scaler_skips_only_a_step_that_fails() -> None:
    weights, optimizers = two_weights(fused=True)
    optimizers[0] = SGD(weights[:1], lr=1.0, fused=True)
    clipper = Clipper(optimizers, 1.0)
    for optimizer in optimizers:
        vars(optimizer)["found_inf"] = torch.ones(())
    optimizers[0].step()
    with interrupted_sgd():
        optimizers[1].step()
    vars(optimizers[1]).pop("found_inf", None)
    optimizers[1].step()
    assert not last_of(clipper).skipped
    assert [bool(weight.any()) for weight in weights] == [False, True]


def test_a_step_from_on_clip_has_its_own_record() -> None:
    weights, optimizers = two_weights()
    for weight in weights:
        weight.grad.zero_()
    calls: list[Record] = []

    def on_clip(record: Record) -> None:
        calls.append(record)
        if len(calls) == 1:
            optimizers[0].step()

    def once_more(*_: object) -> None:
        handle.remove()
        optimizers[0].step()

    clipper = Clipper(optimizers, 1.0, on_clip=on_clip)
    handle = optimizers[0].register_step_post_hook(once_more)
    for optimizer in reversed(optimizers):
        optimizer.step()
    clipper.detach()
    numbers = [record.step for record in clipper.history]
    assert numbers == [*range(len(numbers))]


# Memory


@pytest.fixture
def no_collector() -> Iterator[None]:
    enabled = gc.isenabled()
    # What torch imports for the first optimizer of a process leaves a cycle that holds it.
    SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    gc.collect()
    gc.disable()
    yield
    if enabled:
        gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("several", [False, True])
def test_nothing_is_kept_alive(several: bool) -> None:
    thresholds: Iterator[Any] = itertools.cycle([0.5, Percentile(), Value(0.1), AdaGC(), lambda _: 1.0])
    ways: list[dict[str, Any]] = [
        {},
        {"scope": "parameter"},
        {"skip_above": 1e9, "max_skips": 2},
        {"nonfinite": "skip"},
        {"layers_every": 1},
        {"on_clip": lambda _: None},
    ]
    for options, detached, max_norm in zip(
        [way for way in ways for _ in range(4)],
        itertools.cycle([False, False, True, True]),
        thresholds,
        strict=False,
    ):
        training = Training("fused")
        clipper = Clipper(
            training.optimizers if several else training.first, max_norm, model=training.model, **options
        )
        for step in range(2):
            training.backward(step)
            clipper.loss = 1.0
            training.step()
        training.backward(2)
        with interrupted_sgd():
            training.first.step()
        assert len(clipper.history) == 2
        clipper.norms(), clipper.state_dict()
        if detached:
            clipper.detach()
        held = [weakref.ref(each) for each in (training.model, *training.optimizers, clipper)]
        del training, clipper
        assert [each() for each in held] == [None] * 4, (options, detached, max_norm)


@pytest.mark.parametrize("fused", [False, True])
def test_an_open_round_keeps_no_large_gradient(fused: bool) -> None:
    weights = [nn.Parameter(torch.zeros(100_000)) for _ in range(2)]
    optimizers = [SGD([weight], lr=0.1, fused=fused) for weight in weights]
    _clipper = Clipper(optimizers, 1.0)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    held = [weakref.ref(weight.grad) for weight in weights if weight.grad is not None]
    optimizers[0].step()  # the other one does not
    for optimizer in optimizers:
        optimizer.zero_grad()
    assert [each() for each in held] == [None, None]


def test_a_clipper_without_its_optimizer() -> None:
    clipper = Clipper(SGD([nn.Parameter(torch.ones(2))], lr=0.1), Percentile())
    with pytest.raises(RuntimeError, match="keep a reference to it"):
        _ = clipper.optimizer
    assert clipper.last is None
    assert clipper.state_dict()["steps"] == 0
    clipper.load_state_dict(clipper.state_dict())
    clipper.detach()


def test_an_optimizer_that_is_gone_stops_the_others_of_its_clipper() -> None:
    weights, optimizers = two_weights()
    clipper = Clipper(optimizers, 1.0)
    for optimizer in optimizers:
        optimizer.step()
    del optimizers[1], optimizer
    gc.collect()
    before = weights[0].tolist()
    with pytest.raises(RuntimeError, match=r"keep a reference .* or detach\(\) the Clipper"):
        optimizers[0].step()
    assert (weights[0].tolist(), len(clipper.history)) == (before, 1)
    clipper.detach()
    Clipper(optimizers, 1.0)
    optimizers[0].step()
