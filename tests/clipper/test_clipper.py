"""Clipper: the same as the functions with every optimizer, and what it does about all that may happen."""

import copy
import functools
import gc
import inspect
import io
import json
import math
import pickle
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from helpers import bits, grad_of, interrupted_sgd, last_of, randn, with_gradients
from torch import Tensor, nn

import torchclip
from torchclip import Clipper, Percentile, ZScore, kernel
from torchclip.clipper import Nonfinite, Scope
from torchclip.clipper.clipper import _Set
from torchclip.history import Record

pytestmark = pytest.mark.usefixtures("kernel_on_and_off", "one_thread", "small_ones_too")

INF, NAN = math.inf, math.nan
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "ASGD": {"lr": 0.1},
    "Adadelta": {"lr": 1.0},
    "Adafactor": {"lr": 0.05},
    "Adagrad": {"lr": 0.1},
    "Adam": {"lr": 0.05},
    "AdamW": {"lr": 0.05},
    "Adamax": {"lr": 0.05},
    # Without a line search it diverges on some processors, according to how they round.
    "LBFGS": {"max_iter": 3, "line_search_fn": "strong_wolfe"},
    "Muon": {"lr": 0.05},
    "NAdam": {"lr": 0.05},
    "RAdam": {"lr": 0.05},
    "RMSprop": {"lr": 0.05},
    "Rprop": {"lr": 0.05},
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "SparseAdam": {"lr": 0.05},
}
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False},
    "fused": {"fused": True},
}


def takes(name: str, arguments: dict[str, Any]) -> bool:
    return arguments.keys() <= inspect.signature(getattr(torch.optim, name)).parameters.keys()


FUSED = [name for name in OPTIMIZERS if takes(name, {"fused": True})]
each_fused = pytest.mark.parametrize("name", FUSED)
fused_or_not = pytest.mark.parametrize("fused", [False, True])
each_scope = pytest.mark.parametrize("scope", ["global", "group", "parameter"])


class Net(nn.Module):
    """Only matrices, which is all that Muon takes."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4, sparse=sparse)
        self.inner = nn.Linear(4, 6, bias=False)
        self.outer = nn.Linear(6, 2, bias=False)
        for i, parameter in enumerate(self.parameters()):
            parameter.data = randn(*parameter.shape, seed=i)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.outer(torch.tanh(self.inner(self.embedding(tokens))))
        return scores


def loss_of(model: nn.Module, step: int) -> Tensor:
    tokens = torch.tensor([0, 1, 2, step % 5])
    loss: Tensor = ((model(tokens) - randn(4, 2, seed=step)) ** 2).sum()
    return loss


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Tensor:
    optimizer.zero_grad()
    loss = loss_of(model, step)
    loss.backward()
    return loss


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int],
    before_step: Callable[[], object] = lambda: None,
) -> None:
    for step in steps:
        backward(model, optimizer, step)
        before_step()
        optimizer.step()


def equal(first: nn.Module, second: nn.Module) -> bool:
    return all(bits(a) == bits(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def state_bits(optimizer: torch.optim.Optimizer) -> list[tuple[str, Any]]:
    return [
        (key, bits(value) if isinstance(value, torch.Tensor) else value)
        for state in optimizer.state.values()
        for key, value in state.items()
    ]


def everything(optimizer: torch.optim.Optimizer) -> tuple[list[bytes], list[tuple[str, Any]]]:
    """All that a step may change, but for the gradients."""
    return [bits(p) for group in optimizer.param_groups for p in group["params"]], state_bits(optimizer)


def gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [
        p.grad.to_dense() for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]


def sgd(grads: Sequence[Tensor | None], lr: float = 1.0, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(with_gradients(grads), lr=lr, **options)


def two_groups(fused: bool = False, **second: Any) -> torch.optim.SGD:
    """Gradients of norms 5 and 10."""
    first, other = with_gradients([torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0])])
    return torch.optim.SGD([{"params": [first]}, {"params": [other], **second}], lr=1.0, fused=fused)


def grad_norms(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(g.norm()) for g in gradients(optimizer)]


# The same as the functions


def test_every_optimizer_of_torch_is_here() -> None:
    members = vars(torch.optim).values()
    classes = {m.__name__ for m in members if isinstance(m, type) and issubclass(m, torch.optim.Optimizer)}
    assert classes - {"Optimizer"} == set(OPTIMIZERS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_ends_where_the_function_leads_it(name: str, way: str) -> None:
    if not takes(name, WAYS[way]):
        pytest.skip(f"{name} has no such implementation")
    sparse = name == "SparseAdam"
    models = [Net(sparse), Net(sparse)]
    if sparse:
        models = [m.requires_grad_(False) for m in models]
        for model in models:
            model.embedding.requires_grad_(True)
    plain, clipped = (
        getattr(torch.optim, name)(
            [p for p in m.parameters() if p.requires_grad], **OPTIMIZERS[name], **WAYS[way]
        )
        for m in models
    )
    clipper = Clipper(clipped, 0.5)

    def clip() -> Tensor:
        return torchclip.clip_grad_norm_(plain.param_groups[0]["params"], 0.5)

    if name == "LBFGS":
        for step in range(50):
            plain.step(lambda step=step: (backward(models[0], plain, step), clip())[0])
            clipped.step(lambda step=step: backward(models[1], clipped, step))
    else:
        train(models[0], plain, range(50), clip)
        train(models[1], clipped, range(50))
    summary = clipper.history.summary()
    assert summary.clipped > 40
    assert summary.nonfinite == 0
    if way == "fused":
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    else:
        assert equal(*models)


@fused_or_not
@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_closures_are_clipped_after_their_backward_pass(how: str, fused: bool) -> None:
    models = [Net(), Net()]
    plain, clipped = (torch.optim.Adam(m.parameters(), lr=0.1, fused=fused) for m in models)
    clipper = Clipper(clipped, 0.5)
    for step in range(10):
        expected = backward(models[0], plain, step)
        torchclip.clip_grad_norm_(models[0].parameters(), 0.5)
        plain.step()
        closure = functools.partial(backward, models[1], clipped, step)
        loss = clipped.step(closure) if how == "positional" else clipped.step(closure=closure)
        torch.testing.assert_close(loss, expected)
    assert [record.step for record in clipper.history] == list(range(10))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_closure_of_none_is_none() -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])])
    clipper = Clipper(optimizer, 1.0)
    optimizer.step(None)
    optimizer.step(closure=None)
    assert [record.total_norm for record in clipper.history] == pytest.approx([5.0, 1.0])


def test_gradient_accumulation_clips_the_sum() -> None:
    models = [Net(), Net()]
    plain, clipped = (torch.optim.SGD(m.parameters(), lr=0.1) for m in models)
    clipper = Clipper(clipped, 0.5)
    for step in range(0, 20, 2):
        for model, optimizer in zip(models, (plain, clipped), strict=True):
            backward(model, optimizer, step)
            loss_of(model, step + 1).backward()
        torchclip.clip_grad_norm_(models[0].parameters(), 0.5)
        plain.step()
        clipped.step()
    assert len(clipper.history) == 10
    assert equal(*models)


def test_learning_rate_schedulers_and_groups_that_come_later() -> None:
    models = [Net(), Net()]
    optimizers = [torch.optim.SGD(m.outer.parameters(), lr=0.1) for m in models]
    Clipper(optimizers[1], 0.5)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in optimizers]
    for step in range(10):
        for model, optimizer, scheduler in zip(models, optimizers, schedulers, strict=True):
            if step == 5:
                optimizer.add_param_group({"params": model.inner.parameters(), "lr": 0.3})
                scheduler.base_lrs.append(0.3)
            model.zero_grad()
            loss_of(model, step).backward()
            if model is models[0]:
                params = [p for group in optimizer.param_groups for p in group["params"]]
                torchclip.clip_grad_norm_(params, 0.5)
            optimizer.step()
            scheduler.step()
    assert equal(*models)


def test_compiled_models() -> None:
    models = [Net(), Net()]
    compiled: Any = torch.compile(models[1], backend="aot_eager")
    plain, clipped = (torch.optim.SGD(m.named_parameters(), lr=0.1) for m in (models[0], compiled))
    clipper = Clipper(clipped, 0.5)
    train(models[0], plain, range(5), lambda: torchclip.clip_grad_norm_(models[0].parameters(), 0.5))
    train(compiled, clipped, range(5))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert "_orig_mod.inner.weight" in clipper.norms()


@pytest.mark.parametrize("norm_type", [0, 1, 2, 3.5, "inf", INF, -INF])
def test_every_order(norm_type: float | str) -> None:
    grads = [torch.tensor([3.0, -4.0]), torch.tensor([[0.0, 12.0]])]
    expected = with_gradients([g.clone() for g in grads])
    norm = torchclip.clip_grad_norm_(expected, 0.5, norm_type)
    optimizer = sgd(grads)
    clipper = Clipper(optimizer, 0.5, norm_type=norm_type)
    optimizer.step()
    assert last_of(clipper).total_norm == pytest.approx(float(norm), rel=1e-6)
    assert [bits(g) for g in gradients(optimizer)] == [bits(p.grad) for p in expected]


# Fused steps


FUSED_OPTIONS = [
    *(
        ("Adam", {"lr": 0.05, **o})
        for o in ({}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.1})
    ),
    *(("AdamW", {"lr": 0.05, **o}) for o in ({}, {"amsgrad": True}, {"maximize": True})),
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    ("Adagrad", {"lr": 0.1}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "maximize": True}),
]


def test_every_fused_optimizer_is_here() -> None:
    assert {name for name, _ in FUSED_OPTIONS} == set(FUSED)


@pytest.mark.parametrize(
    ("dtype", "fused_too"),
    [
        (torch.float32, False),
        (torch.float32, True),
        (torch.float64, False),
        (torch.bfloat16, True),
        (torch.half, True),
    ],
)
@pytest.mark.parametrize(("name", "options"), FUSED_OPTIONS)
def test_after_a_fused_step_all_is_as_after_scaling_in_place(
    name: str, options: dict[str, Any], dtype: torch.dtype, fused_too: bool
) -> None:
    low = dtype in (torch.bfloat16, torch.half)
    if low and name == "SGD":
        pytest.skip("torch's own steps are wrong (pytorch issue 191763)")
    runs = []
    for clips, fused in ((True, True), (False, fused_too)):
        parameters = [nn.Parameter(randn(17, dtype=dtype)), nn.Parameter(randn(3, 5, dtype=dtype, seed=1))]
        optimizer = getattr(torch.optim, name)(parameters, fused=fused, **options)
        if clips:
            clipper = Clipper(optimizer, 0.7)
        for step in range(3):
            for i, parameter in enumerate(parameters):
                parameter.grad = randn(*parameter.shape, dtype=dtype, seed=10 * step + i, scale=3.0)
            if not clips:
                torchclip.clip_grad_norm_(parameters, 0.7)
            optimizer.step()
            assert not hasattr(optimizer, "grad_scale")
        states = [{k: v for k, v in s.items() if v is not None} for s in optimizer.state.values()]
        runs.append(([p.detach() for p in parameters], gradients(optimizer), states))
    assert clipper.history.summary().clipped == 3
    tolerance = 4 * torch.finfo(dtype).eps if low else {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(*runs, rtol=tolerance, atol=tolerance)


@each_fused
def test_a_fused_step_takes_the_coefficient_along_and_no_other_pass(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1, fused=True)
    if not hasattr(optimizer, "_step_supports_amp_scaling"):
        pytest.skip("does not take a grad_scale in this version of torch (Adagrad, in 2.10)")
    clipper = Clipper(optimizer, 0.5)

    def refuse(*_: object) -> None:
        raise AssertionError("the gradients were scaled in a pass of their own")

    monkeypatch.setattr("torchclip.clipper.clipper._Set.scale_", refuse)
    train(model, optimizer, range(2))
    assert clipper.history.summary().clipped == 2
    assert float(torchclip.get_total_norm(gradients(optimizer))) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("size", [3, 600_000])
def test_small_gradients_are_scaled_in_place_by_the_kernel(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    optimizer = sgd([torch.ones(size)], fused=True)
    scaled: list[Any] = []
    scale_ = _Set.scale_

    def note(one: Any) -> None:
        scaled.append(one)
        scale_(one)

    monkeypatch.setattr("torchclip.clipper.clipper._Set.scale_", note)
    Clipper(optimizer, 1.0)
    optimizer.step()
    in_place = size == 3 and kernel.status().startswith("active")
    assert len(scaled) == int(in_place)
    # Torch's own norm of so many elements is off by more than this.
    assert float(torchclip.get_total_norm(gradients(optimizer))) == pytest.approx(1.0, rel=1e-4)


@fused_or_not
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_an_infinite_or_nan_norm_spreads_as_torchs(value: float, fused: bool) -> None:
    expected = with_gradients([torch.tensor([1.0, value]), torch.tensor([2.0])])
    nn.utils.clip_grad_norm_(expected, 1.0)
    optimizer = sgd([torch.tensor([1.0, value]), torch.tensor([2.0])], fused=fused)
    clipper = Clipper(optimizer, 1.0)
    optimizer.step()
    for p, q in zip(optimizer.param_groups[0]["params"], expected, strict=True):
        torch.testing.assert_close(p.grad, q.grad, equal_nan=True)
        torch.testing.assert_close(p.detach(), -q.grad, equal_nan=True)
    assert last_of(clipper).nonfinite
    assert not hasattr(optimizer, "grad_scale")


@fused_or_not
@pytest.mark.parametrize("max_norm", [0.0, 1e-30])
def test_coefficients_beyond_float32(max_norm: float, fused: bool) -> None:
    optimizer = sgd([torch.tensor([3e8, 4e8])], fused=fused)
    clipper = Clipper(optimizer, max_norm)
    optimizer.step()
    assert last_of(clipper).clip_coef == pytest.approx(max_norm / 5e8)
    expected = [0.6 * max_norm, 0.8 * max_norm]
    assert gradients(optimizer)[0].tolist() == pytest.approx(expected, rel=1e-5, abs=0)


@fused_or_not
def test_a_gradient_that_two_parameters_share_is_scaled_once(fused: bool) -> None:
    first, second = parameters = with_gradients([torch.tensor([3.0, 4.0]), None])
    second.grad = first.grad
    optimizer = torch.optim.SGD(parameters, lr=1.0, fused=fused)
    Clipper(optimizer, 1.0)
    optimizer.step()
    assert first.grad.tolist() == pytest.approx([0.6, 0.8])
    assert second.tolist() == pytest.approx([-0.6, -0.8])


def test_shared_gradients_with_a_threshold_for_each_parameter() -> None:
    first, second, third = parameters = with_gradients([torch.tensor([3.0, 4.0]), None, torch.tensor([1.0])])
    second.grad = first.grad
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    Clipper(optimizer, Answering(2.0), scope="parameter")
    optimizer.step()
    assert (first.grad.tolist(), third.grad.tolist()) == (pytest.approx([1.2, 1.6]), [1.0])


@fused_or_not
def test_parameters_without_gradients_are_passed_over(fused: bool) -> None:
    parameters = with_gradients([None, torch.tensor([3.0, 4.0]), None])
    optimizer = torch.optim.Adam(parameters, fused=fused)
    clipper = Clipper(optimizer, 1.0)
    optimizer.step()
    assert parameters[1].grad.tolist() == pytest.approx([0.6, 0.8])
    assert list(clipper.norms()) == ["param_groups[0]['params'][1]"]
    assert len(optimizer.state) == 1


@fused_or_not
@each_scope
def test_a_step_without_any_gradient(scope: Scope, fused: bool) -> None:
    optimizer = torch.optim.Adam(with_gradients([None, None]), fused=fused)
    clipper = Clipper(optimizer, 1.0, scope=scope)
    optimizer.step()
    assert last_of(clipper)[1:] == (0.0, 1.0 if scope != "parameter" else INF, 1.0, False, False, False)
    assert clipper.norms() == {}


@fused_or_not
def test_a_default_device_elsewhere_does_not_matter(fused: bool) -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])], fused=fused)
    clipper = Clipper(optimizer, 1.0)
    with torch.device("meta"):
        optimizer.step()
    assert last_of(clipper).total_norm == 5.0
    assert gradients(optimizer)[0].tolist() == pytest.approx([0.6, 0.8])


# Scopes and thresholds


@fused_or_not
@pytest.mark.parametrize(
    ("scope", "expected"),
    [("global", [5 / 125**0.5, 10 / 125**0.5]), ("group", [1, 1]), ("parameter", [1, 1])],
)
def test_what_is_clipped_together(scope: Scope, expected: list[float], fused: bool) -> None:
    optimizer = two_groups(fused)
    clipper = Clipper(optimizer, 1.0, scope=scope)
    optimizer.step()
    assert grad_norms(optimizer) == pytest.approx(expected, rel=1e-5)
    assert last_of(clipper).total_norm == pytest.approx(125**0.5)
    assert last_of(clipper).clip_coef == pytest.approx(1 / 125**0.5 if scope == "global" else 0.1, rel=1e-5)


def test_parameters_of_a_group_apart() -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4])])
    Clipper(optimizer, 1.0, scope="parameter")
    optimizer.step()
    assert grad_norms(optimizer) == pytest.approx([1.0, 0.5], rel=1e-5)


@fused_or_not
@each_scope
def test_a_groups_own_max_norm_can_change(scope: Scope, fused: bool) -> None:
    optimizer = two_groups(fused, max_norm=0.5)
    clipper = Clipper(optimizer, 2.0, scope=scope)
    seen = []
    for own in (0.5, None, torch.tensor(4.0)):
        optimizer.param_groups[1]["max_norm"] = own
        for group, grad in zip(optimizer.param_groups, ([3.0, 4.0], [6.0, 8.0]), strict=True):
            group["params"][0].grad = torch.tensor(grad)
        optimizer.step()
        seen += grad_norms(optimizer)
    assert seen == pytest.approx([2, 0.5, 2, 10, 2, 4], rel=1e-5)
    assert [r.max_norm for r in clipper.history] == [0.5, 2.0, 2.0]
    assert [r.total_norm for r in clipper.history] == pytest.approx([125**0.5] * 3)


@fused_or_not
def test_all_groups_unclipped(fused: bool) -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])], fused=fused)
    optimizer.param_groups[0]["max_norm"] = None
    clipper = Clipper(optimizer, 1.0)
    optimizer.step()
    assert gradients(optimizer)[0].tolist() == [3.0, 4.0]
    assert clipper.last == (0, 5.0, INF, 1.0, False, False, False)


@fused_or_not
@pytest.mark.parametrize(("own", "error"), [(-1.0, ValueError), (NAN, ValueError), ("abc", TypeError)])
def test_a_groups_own_max_norm_is_checked_before_anything_changes(
    own: Any, error: type[Exception], fused: bool
) -> None:
    optimizer = two_groups(fused, max_norm=own)
    clipper = Clipper(optimizer, 1.0, scope="group")
    before = everything(optimizer)
    with pytest.raises(error, match=r"param_groups\[1\]\['max_norm'\]"):
        optimizer.step()
    assert grad_norms(optimizer) == [5.0, 10.0]
    assert everything(optimizer) == before
    assert clipper.last is None


@fused_or_not
def test_a_callable_gets_the_number_of_the_step(fused: bool) -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])], fused=fused)
    clipper = Clipper(optimizer, lambda step: 4.0 - step)
    for _ in range(3):
        optimizer.step()
    assert [r.max_norm for r in clipper.history] == [4.0, 3.0, 2.0]
    assert grad_norms(optimizer) == pytest.approx([2.0])


class Answering:
    """A threshold object that gives these answers in turn."""

    def __init__(self, *answers: Any) -> None:
        self.answers = answers
        self.asked: list[float] = []

    def update(self, norm: float) -> Any:
        self.asked.append(norm)
        return self.answers[(len(self.asked) - 1) % len(self.answers)]

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.asked = list(state["asked"])


@fused_or_not
def test_a_users_own_threshold(fused: bool) -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])], fused=fused)
    clipper = Clipper(optimizer, Answering(INF, 2.0))
    optimizer.step()
    assert grad_norms(optimizer) == [5.0]
    optimizer.step()
    assert grad_norms(optimizer) == pytest.approx([2.0])
    assert clipper.state_dict()["thresholds"] == {"all": {"asked": [5.0, 5.0]}}


@each_scope
def test_what_is_clipped_apart_learns_apart(scope: Scope) -> None:
    threshold = Percentile(50)
    optimizer = two_groups()
    Clipper(optimizer, threshold, scope=scope)
    seen = []
    for factor in (1.0, 3.0):
        for group, grad in zip(optimizer.param_groups, ([3.0, 4.0], [6.0, 8.0]), strict=True):
            group["params"][0].grad = torch.tensor(grad) * factor
        optimizer.step()
        seen += grad_norms(optimizer)
    assert seen == pytest.approx([5, 10, 10, 20], rel=1e-5)  # the median of 1 and 3 is 2
    assert threshold.state_dict()["norms"] == []


@fused_or_not
@pytest.mark.parametrize(
    ("max_norm", "error", "message"),
    [
        (Answering(NAN), ValueError, "Answering.update"),
        (Answering(-1.0), ValueError, "Answering.update"),
        (Answering(None), TypeError, "Answering.update"),
        (lambda step: NAN, ValueError, r"max_norm\(0\)"),
        (lambda step: -1.0, ValueError, r"max_norm\(0\)"),
        (lambda step: "abc", TypeError, r"max_norm\(0\)"),
    ],
)
def test_impossible_thresholds_are_refused_before_anything_changes(
    max_norm: Any, error: type[Exception], message: str, fused: bool
) -> None:
    optimizer = two_groups(fused)
    clipper = Clipper(optimizer, max_norm)
    before = everything(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert grad_norms(optimizer) == [5.0, 10.0]
    assert everything(optimizer) == before
    assert not hasattr(optimizer, "grad_scale")
    assert clipper.last is None


# What to do about gradients that are not finite


def with_spoiled_step(fused: bool, **options: Any) -> tuple[Net, torch.optim.AdamW, Clipper]:
    """An optimizer after a regular step, with gradients of which some are not finite."""
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


@fused_or_not
@each_scope
def test_error_names_the_parameters_and_changes_nothing(scope: Scope, fused: bool) -> None:
    _, optimizer, clipper = with_spoiled_step(fused, scope=scope, nonfinite="error")
    before = everything(optimizer), [bits(g) for g in gradients(optimizer)], str(clipper.state_dict())
    with pytest.raises(RuntimeError, match=r"inner\.weight of shape \(6, 4\) \(1 inf, 1 nan\)") as caught:
        optimizer.step()
    assert "outer" not in str(caught.value)
    assert "nonfinite='skip'" in str(caught.value)
    after = everything(optimizer), [bits(g) for g in gradients(optimizer)], str(clipper.state_dict())
    assert after == before


@fused_or_not
@each_scope
def test_skip_changes_neither_parameters_nor_state(scope: Scope, fused: bool) -> None:
    model, optimizer, clipper = with_spoiled_step(fused, scope=scope, nonfinite="skip")
    before, grads = everything(optimizer), [grad_of(p) for p in model.parameters()]
    values, learned = [bits(g) for g in grads], clipper.state_dict()["thresholds"]
    optimizer.step()
    assert everything(optimizer) == before
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert [bits(g) for g in grads] == values
    assert clipper.state_dict()["thresholds"] == learned
    assert (last_of(clipper).step, last_of(clipper).skipped, last_of(clipper).clipped) == (1, True, False)
    train(model, optimizer, range(2, 3))
    assert everything(optimizer) != before
    assert (last_of(clipper).step, last_of(clipper).skipped) == (2, False)
    assert clipper.history.summary().skipped == 1


@fused_or_not
@each_scope
def test_zero_clips_the_rest(scope: Scope, fused: bool) -> None:
    model, optimizer, clipper = with_spoiled_step(fused, scope=scope, nonfinite="zero")
    reference, plain, its_clipper = with_spoiled_step(fused, scope=scope)
    grad = grad_of(reference.inner.weight)
    grad[0, 0] = grad[1, 1] = 0
    optimizer.step()
    plain.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close([a, a.grad], [b, b.grad], rtol=1e-6, atol=0)
    assert last_of(clipper).nonfinite
    learned, its = (c.state_dict()["thresholds"] for c in (clipper, its_clipper))
    assert {name: t["norms"] for name, t in learned.items()} == {
        name: pytest.approx(t["norms"], rel=1e-12) for name, t in its.items()
    }


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
@each_scope
def test_propagate_leaves_thresholds_alone(scope: Scope, fused: bool) -> None:
    model, optimizer, clipper = with_spoiled_step(fused, scope=scope)
    optimizer.step()
    assert model.inner.weight.isnan().any()
    assert last_of(clipper).nonfinite
    assert all(len(t["norms"]) <= 2 for t in clipper.state_dict()["thresholds"].values())


@pytest.mark.parametrize("nonfinite", ["error", "skip", "zero"])
def test_a_group_that_is_not_clipped_is_looked_at_too(nonfinite: Nonfinite) -> None:
    optimizer = two_groups(max_norm=None)
    optimizer.param_groups[1]["params"][0].grad[0] = NAN
    Clipper(optimizer, 1.0, nonfinite=nonfinite)
    if nonfinite == "error":
        with pytest.raises(RuntimeError, match=r"param_groups\[1\]\['params'\]\[0\]"):
            optimizer.step()
    else:
        optimizer.step()
    assert all(p.isfinite().all() for group in optimizer.param_groups for p in group["params"])


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


# Going on after a break


def resumable(
    fused: bool, max_norm: Callable[[], Any], scope: Scope
) -> tuple[Net, torch.optim.AdamW, Clipper]:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    return model, optimizer, Clipper(optimizer, max_norm(), scope=scope)


def through_torch(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_json(state: dict[str, Any]) -> Any:
    return json.loads(json.dumps(state))


@fused_or_not
@each_scope
@pytest.mark.parametrize("through", [through_torch, through_json])
@pytest.mark.parametrize(
    "max_norm",
    [
        lambda: 0.5,
        lambda: lambda step: 1 / (1 + step),
        lambda: Percentile(30, window=5),
        lambda: ZScore(warmup=8, threshold=0.5),
        lambda: Answering(0.5, 1.0, 0.2),
    ],
)
def test_a_resumed_run_goes_on_as_if_there_had_been_no_break(
    max_norm: Any, through: Callable[[Any], Any], scope: Scope, fused: bool
) -> None:
    model, optimizer, clipper = resumable(fused, max_norm, scope)
    train(model, optimizer, range(6))
    saved = (
        copy.deepcopy(model.state_dict()),
        copy.deepcopy(optimizer.state_dict()),
        through(clipper.state_dict()),
    )
    train(model, optimizer, range(6, 15))

    resumed, its_optimizer, its_clipper = resumable(fused, max_norm, scope)
    parts: list[Any] = [resumed, its_optimizer, its_clipper]
    for part, state in zip(parts, saved, strict=True):
        part.load_state_dict(state)
    train(resumed, its_optimizer, range(6, 15))
    assert equal(model, resumed)
    assert everything(optimizer) == everything(its_optimizer)
    assert its_clipper.state_dict() == clipper.state_dict()
    assert list(its_clipper.history) == list(clipper.history)


def test_wrong_states_are_refused_and_change_nothing() -> None:
    _, optimizer, clipper = resumable(False, lambda: Percentile(30), "global")
    backward(Net(), optimizer, 0)
    optimizer.step()
    good = clipper.state_dict()
    before = str(good)
    broken_history = {**good, "thresholds": {}, "history": {"records": {}}}
    for state, message in [
        ({}, "`state` lacks 'steps'"),
        ({**good, "steps": "x"}, r"`state\['steps'\]` must be an integer, got 'x'"),
        ({**good, "steps": -1}, r"`state\['steps'\]` must be at least 0"),
        ({**good, "scope": 1}, r"`state\['scope'\]` must be one of"),
        ({**good, "norm_type": "two"}, r"`state\['norm_type'\]` must be a number"),
        ({**good, "thresholds": [1]}, r"`state\['thresholds'\]` must be a dictionary"),
        ({**good, "history": None}, r"`state\['history'\]` must be a dictionary"),
        (optimizer.state_dict(), "Clipper.state_dict"),
        ({**good, "scope": "group"}, r"\('group', 2.0\)"),
        ({**good, "norm_type": 1.0}, r"\('global', 1.0\)"),
        ({**good, "thresholds": {"all": ZScore().state_dict()}}, "kind 'ZScore'"),
        (broken_history, "History.state_dict"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            clipper.load_state_dict(state)
        assert str(clipper.state_dict()) == before
    numeric = Clipper(sgd([torch.ones(2)]), 1.0)
    with pytest.raises(ValueError, match=r"`max_norm` is 1\.0"):
        numeric.load_state_dict(good)


@fused_or_not
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
def test_copies_of_the_optimizer_do_not_clip_until_they_get_a_clipper(
    copied: Callable[[Any], Any], fused: bool
) -> None:
    optimizer = torch.optim.SGD(with_gradients([torch.tensor([3.0, 4.0])]), lr=1.0, fused=fused)
    clipper = Clipper(optimizer, Percentile(50, max_norm=1.0))
    optimizer.step()
    twin = copied(optimizer)
    (parameter,) = twin.param_groups[0]["params"]
    parameter.grad = torch.tensor([3.0, 4.0])
    twin.step()
    assert parameter.grad.tolist() == [3.0, 4.0]
    assert len(clipper.history) == 1
    its_clipper = Clipper(twin, Percentile(50, max_norm=1.0))
    its_clipper.load_state_dict(clipper.state_dict())
    twin.step()
    assert [record.step for record in its_clipper.history] == [0, 1]
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_clipper_cannot_be_copied(copied: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="load this one's state_dict"):
        copied(Clipper(sgd([torch.ones(2)]), 1.0))


def test_a_history_of_another_length_stays_when_a_state_is_loaded() -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])])
    clipper = Clipper(optimizer, 1.0)
    clipper.history = torchclip.history.History(maxlen=2)
    for _ in range(5):
        optimizer.step()
    assert [record.step for record in clipper.history] == [3, 4]
    its_clipper = Clipper(sgd([torch.tensor([3.0, 4.0])]), 1.0)
    its_clipper.history = torchclip.history.History(maxlen=1)
    its_clipper.load_state_dict(clipper.state_dict())
    assert [record.step for record in its_clipper.history] == [4]
    assert its_clipper.history.summary().steps == 5


# Looking at it


@pytest.mark.parametrize(
    ("scope", "names"),
    [
        ("global", ["all"]),
        ("group", ["group 0", "group 1"]),
        ("parameter", ["group 0, parameter 0", "group 1, parameter 0"]),
    ],
)
def test_what_the_threshold_objects_have_learned(scope: Scope, names: list[str]) -> None:
    optimizer = two_groups()
    clipper = Clipper(optimizer, Percentile(50, warmup=1), scope=scope)
    assert clipper.thresholds == {}
    optimizer.step()
    assert list(clipper.thresholds) == names
    for threshold, norm in zip(
        clipper.thresholds.values(), [125**0.5] if scope == "global" else [5, 10], strict=True
    ):
        assert isinstance(threshold, Percentile)
        assert threshold.state_dict()["norms"] == pytest.approx([norm])
    with pytest.raises(TypeError):
        clipper.thresholds["all"] = Percentile()  # type: ignore[index]
    its_clipper = Clipper(two_groups(), Percentile(50), scope=scope)
    its_clipper.load_state_dict(clipper.state_dict())
    assert list(its_clipper.thresholds) == names
    assert Clipper(two_groups(), 1.0).thresholds == {}


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
        (0, 5.0, 1.0, pytest.approx(0.2), True, False, False),
        {"param_groups[0]['params'][0]": 5.0},
    )
    assert clipper.last is clipper.history[-1]
    assert (last_of(clipper).step, last_of(clipper).total_norm) == (1, pytest.approx(1.0))


def test_norms_are_by_name_and_largest_first() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    clipper = Clipper(optimizer, 1.0)
    for parameter, value in zip(model.parameters(), (1.0, NAN, 2.0), strict=True):
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[0, 0] = value
    norms = clipper.norms()
    assert list(norms) == ["inner.weight", "outer.weight", "embedding.weight"]
    assert list(norms.values())[1:] == [2.0, 1.0]


def test_norms_of_two_models_with_the_same_names() -> None:
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    groups = [{"params": m.named_parameters()} for m in (first, second)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for model, value in ((first, 1.0), (second, 2.0)):
        model.weight.grad = torch.tensor([[value, 0], [0, 0]])
    assert Clipper(optimizer, 1.0).norms() == {"param_groups[1]['params'][0]": 2.0, "weight": 1.0}


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


# With what else may happen


@fused_or_not
@pytest.mark.parametrize("with_closure", [False, True])
def test_a_subclass_that_calls_its_parents_step_is_clipped_once(with_closure: bool, fused: bool) -> None:
    class Counting(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    models = [Net(), Net()]
    plain = torch.optim.Adam(models[0].parameters(), lr=0.05, fused=fused)  # puts the hooks into Adam.step
    clipped = Counting(models[1].parameters(), lr=0.05, fused=fused)
    clippers = [Clipper(plain, Percentile()), Clipper(clipped, Percentile())]
    train(models[0], plain, range(5))
    if with_closure:
        for step in range(5):
            clipped.step(functools.partial(backward, models[1], clipped, step))
    else:
        train(models[1], clipped, range(5))
    assert equal(*models)
    assert list(clippers[0].history) == list(clippers[1].history)


@fused_or_not
def test_other_hooks_work_before_and_after(fused: bool) -> None:
    optimizer = sgd([torch.tensor([0.3, 0.4])], fused=fused)
    seen = []

    def multiply(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        gradients(optimizer)[0].mul_(10)

    optimizer.register_step_pre_hook(multiply)
    clipper = Clipper(optimizer, 1.0)
    optimizer.register_step_pre_hook(multiply)
    optimizer.register_step_post_hook(lambda o, *_: seen.extend(grad_norms(o)))
    optimizer.step()
    assert last_of(clipper).total_norm == pytest.approx(5.0)
    assert seen == pytest.approx([10.0])


@fused_or_not
def test_a_subclass_finds_clipped_gradients_in_its_step(fused: bool) -> None:
    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None, noise: float = 1.0) -> Any:
            gradients(self)[0].add_(noise)
            return super().step(closure)

    optimizer = Noisy(with_gradients([torch.tensor([3.0, 4.0])]), lr=1.0, fused=fused)
    Clipper(optimizer, 1.0)
    optimizer.step()
    assert optimizer.param_groups[0]["params"][0].tolist() == pytest.approx([-1.6, -1.8])


def test_a_subclass_may_take_something_else_than_a_closure() -> None:
    class Scaled(torch.optim.SGD):
        def step(self, lr_scale: float = 1.0) -> Any:  # type: ignore[override]
            gradients(self)[0].mul_(lr_scale)
            return super().step()

    optimizer = Scaled(with_gradients([torch.tensor([3.0, 4.0])]), lr=1.0)
    clipper = Clipper(optimizer, 1.0)
    optimizer.step(0.5)
    assert optimizer.param_groups[0]["params"][0].tolist() == pytest.approx([-0.3, -0.4])
    assert last_of(clipper).total_norm == 5.0


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


def test_a_group_without_parameters_does_not_count() -> None:
    (weight,) = with_gradients([torch.tensor([3.0, 4.0])])
    groups: list[dict[str, Any]] = [{"params": [weight], "max_norm": 2.0}, {"params": []}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    clipper = Clipper(optimizer, Percentile())
    optimizer.step()
    assert (last_of(clipper).max_norm, dict(clipper.thresholds)) == (2.0, {})


def test_after_a_skipped_step_that_failed_old_gradients_do_not_come_back_beside_new_ones() -> None:
    first, second = with_gradients([torch.tensor([3.0, INF]), torch.tensor([1.0])])
    optimizer = torch.optim.SGD([first, second], lr=1.0)
    clipper = Clipper(optimizer, 1.0, nonfinite="skip")
    with interrupted_sgd():
        optimizer.step()
    first.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert (last_of(clipper).total_norm, second.grad) == (5.0, None)


@fused_or_not
@pytest.mark.parametrize("value", [4.0, INF])
def test_norms_after_a_step_that_failed(value: float, fused: bool) -> None:
    optimizer = sgd([torch.tensor([3.0, value])], fused=fused)
    clipper = Clipper(optimizer, 1.0, nonfinite="skip")
    with interrupted_sgd():
        optimizer.step()
    expected = math.hypot(3.0, value) if fused or value == INF else 1.0
    assert list(clipper.norms().values()) == pytest.approx([expected])


@each_scope
@pytest.mark.parametrize("max_norm", [Percentile(100), ZScore(warmup=1)])
def test_a_norm_at_a_threshold_that_learns_is_left_alone(max_norm: Any, scope: Scope) -> None:
    optimizer = sgd([torch.tensor([3e-6, 4e-6])])
    clipper = Clipper(optimizer, max_norm, scope=scope)
    for _ in range(3):
        optimizer.step()
    assert gradients(optimizer)[0].tolist() == torch.tensor([3e-6, 4e-6]).tolist()
    assert clipper.history.summary().clipped == 0


@fused_or_not
@pytest.mark.parametrize("value", [4.0, INF, NAN])
def test_after_a_step_that_failed_the_next_one_is_as_usual(value: float, fused: bool) -> None:
    parameters = with_gradients([torch.tensor([3.0, value])])
    optimizer = torch.optim.SGD(parameters, lr=1.0, fused=fused)
    clipper = Clipper(optimizer, 1.0, nonfinite="skip" if value != 4.0 else "propagate")
    with interrupted_sgd():
        optimizer.step()
    parameters[0].grad = torch.tensor([6.0, 8.0])
    optimizer.step()
    assert (last_of(clipper).step, last_of(clipper).total_norm) == (0, 10.0)
    assert parameters[0].tolist() == pytest.approx([-0.6, -0.8])
    assert not hasattr(optimizer, "grad_scale")


def test_a_closure_that_fails() -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])])
    clipper = Clipper(optimizer, 1.0)

    def fail() -> None:
        raise KeyError("data")

    with pytest.raises(KeyError, match="data"):
        optimizer.step(fail)
    assert clipper.last is None
    assert grad_norms(optimizer) == [5.0]
    optimizer.step()
    assert grad_norms(optimizer) == pytest.approx([1.0])


@fused_or_not
def test_an_optimizer_that_calls_its_closure_twice(fused: bool) -> None:
    class Twice(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for _ in range(2):
                with torch.enable_grad():
                    closure()
            return super().step()

    weight = nn.Parameter(torch.zeros(2))
    optimizer = Twice([weight], lr=1.0, fused=fused)
    clipper = Clipper(optimizer, 1.0, nonfinite="skip")
    slopes = iter([NAN, 5.0, 4.0, 5.0, 5.0, NAN])

    def closure() -> None:
        optimizer.zero_grad()
        (weight[0] * next(slopes)).backward()

    for expected in (-1.0, -2.0, -2.0):
        optimizer.step(closure)
        assert weight.tolist() == pytest.approx([expected, 0.0], rel=1e-6)
    assert grad_of(weight).isnan().any()
    assert not hasattr(optimizer, "grad_scale")
    assert [(r.step, r.skipped) for r in clipper.history] == [
        *[(0, True), (0, False)],
        *[(1, False), (1, False)],
        *[(2, False), (2, True)],
    ]
    assert [r.total_norm for r in clipper.history][1:5] == [5.0, 4.0, 5.0, 5.0]


# Attaching and detaching


def test_detach_and_with() -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])])
    with Clipper(optimizer, 1.0) as clipper:
        optimizer.step()
        assert grad_norms(optimizer) == pytest.approx([1.0])
    optimizer.param_groups[0]["params"][0].grad.mul_(5)
    optimizer.step()
    assert grad_norms(optimizer) == pytest.approx([5.0])
    assert len(clipper.history) == 1
    with Clipper(optimizer, 2.0):
        clipper.detach()  # a second time: without effect on the new one
        with pytest.raises(ValueError, match="already has a Clipper"):
            Clipper(optimizer, 1.0)
        optimizer.step()
    assert grad_norms(optimizer) == pytest.approx([2.0])


@fused_or_not
def test_detach_during_a_step_is_refused(fused: bool) -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])], fused=fused)
    clipper = Clipper(optimizer, 1.0, on_clip=lambda record: clipper.detach())
    with pytest.raises(RuntimeError, match=r"after optimizer\.step"):
        optimizer.step()
    clipper.detach()
    optimizer.step()
    assert grad_norms(optimizer) == [5.0]


def test_a_clipper_that_nobody_holds_goes_on_clipping() -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])])
    Clipper(optimizer, 1.0)
    gc.collect()
    optimizer.step()
    assert grad_norms(optimizer) == pytest.approx([1.0])


@pytest.mark.parametrize("fails", [False, True])
def test_both_are_freed_with_the_optimizer(fails: bool) -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])], fused=True)
    clipper = Clipper(optimizer, 1.0, nonfinite="skip")
    optimizer.step()
    if fails:
        with interrupted_sgd():
            optimizer.step()
    left = weakref.ref(optimizer), weakref.ref(clipper)
    del optimizer, clipper
    gc.collect()
    assert [ref() for ref in left] == [None, None]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            (1.0,),
            {"scope": "layer"},
            ValueError,
            "`scope` must be one of 'global', 'group', 'parameter', got 'layer' \\(str\\)",
        ),
        (
            (1.0,),
            {"nonfinite": None},
            ValueError,
            "`nonfinite` must be one of 'propagate', 'error', 'skip', 'zero'",
        ),
        ((1.0,), {"norm_type": NAN}, ValueError, "norm_type"),
        ((1.0,), {"norm_type": "two"}, TypeError, "norm_type"),
        ((1.0,), {"on_clip": 1}, TypeError, "`on_clip` must be callable"),
        ((-1.0,), {}, ValueError, "`max_norm` must be at least 0"),
        ((NAN,), {}, ValueError, "`max_norm` must be at least 0"),
        (("abc",), {}, TypeError, "max_norm"),
        ((None,), {}, TypeError, "max_norm"),
        ((True,), {}, TypeError, "max_norm"),
        ((Percentile,), {}, TypeError, r"the class Percentile; pass an object of it, such as Percentile\(\)"),
    ],
)
def test_misuse_is_refused_and_leaves_the_optimizer_as_it_was(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])])
    with pytest.raises(error, match=message):
        Clipper(optimizer, *arguments, **options)
    optimizer.step()
    assert grad_norms(optimizer) == [5.0]
    Clipper(optimizer, 1.0)


@pytest.mark.parametrize("optimizer", [None, nn.Linear(1, 1), [nn.Parameter(torch.ones(1))]])
def test_only_optimizers_have_clippers(optimizer: Any) -> None:
    with pytest.raises(TypeError, match=r"`optimizer` must be a torch\.optim\.Optimizer"):
        Clipper(optimizer, 1.0)


def test_a_step_with_several_closures_has_several_records_and_counts_once() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([weight], lr=0.01, max_iter=3)
    clipper = Clipper(optimizer, 0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    summary = clipper.history.summary()
    assert len(clipper.history) > 4
    assert (summary.steps, summary.clipped, summary.kept) == (4, 4, 4)


def test_lbfgs_cannot_skip() -> None:
    with pytest.raises(ValueError, match="LBFGS"):
        Clipper(torch.optim.LBFGS([nn.Parameter(torch.ones(1))]), 1.0, nonfinite="skip")


@pytest.mark.parametrize("norm_type", [0, -1, "-inf"])
@pytest.mark.parametrize("nonfinite", ["error", "skip", "zero"])
def test_policies_need_a_norm_that_shows_what_is_not_finite(
    nonfinite: Nonfinite, norm_type: float | str
) -> None:
    optimizer = sgd([torch.tensor([3.0, INF])])
    with pytest.raises(ValueError, match=rf"`nonfinite='{nonfinite}'`.*pass an order above 0.*'propagate'"):
        Clipper(optimizer, 1.0, norm_type=norm_type, nonfinite=nonfinite)
    Clipper(optimizer, 1.0, norm_type=norm_type)


def test_repr() -> None:
    clipper = Clipper(sgd([torch.ones(1)]), Percentile(20), scope="group")
    threshold = "Percentile(percentile=20.0, window=None, warmup=0, max_norm=inf)"
    assert repr(clipper) == (
        f"Clipper(SGD, max_norm={threshold}, norm_type=2.0, scope='group', nonfinite='propagate')"
    )


@pytest.mark.slow
@fused_or_not
def test_ten_thousand_steps_leave_nothing_behind_but_the_history(fused: bool) -> None:
    optimizer = sgd([torch.tensor([3.0, 4.0])], lr=0.0, fused=fused)
    clipper = Clipper(optimizer, 1.0, nonfinite="skip")
    parameter = optimizer.param_groups[0]["params"][0]
    clipper.history = torchclip.history.History(maxlen=100)

    def tracked_after(steps: int) -> int:
        for step in range(steps):
            parameter.grad.fill_(NAN if step % 7 == 0 else 5.0)
            optimizer.step()
        len(clipper.history)
        gc.collect()
        return len(gc.get_objects())

    before = tracked_after(1_100)
    assert tracked_after(8_900) <= before + 50
    assert (len(clipper.history), clipper.history.summary().steps) == (100, 10_000)
