"""One step of an optimizer: nesting, closures, exceptions, and changes that are undone afterwards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from clipper_helpers import NAN, Net, fused_or_not, grad_norms, gradients, sgd
from helpers import grad_of, interrupted_sgd, last_of, with_gradients
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict

from torchclip import Clipper, Percentile
from torchclip.clipper import Scope

pytestmark = pytest.mark.usefixtures("each_way")


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_a_closure_is_clipped_in_a_first_step_without_a_learning_rate(how: str) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([weight], lr=0.0, betas=(0.0, 0.0))  # as a warm-up begins
    clipper = Clipper(optimizer, 1.0)

    def closure() -> float:
        weight.grad = torch.tensor([3.0, 4.0])
        return 0.0

    _ = optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
    assert last_of(clipper).total_norm == 5.0
    assert optimizer.state[weight]["exp_avg"].tolist() == pytest.approx([0.6, 0.8])


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


@pytest.mark.parametrize(("fused", "several"), [(False, False), (True, False), (False, True)])
def test_an_optimizer_that_calls_its_closure_twice(fused: bool, several: bool) -> None:
    class Twice(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for _ in range(2):
                with torch.enable_grad():
                    closure()
            return super().step()

    weight = nn.Parameter(torch.zeros(2))
    optimizer = Twice([weight], lr=1.0, fused=fused)
    others = [sgd([None])] * several
    clipper = Clipper([optimizer, *others], 1.0, nonfinite="skip", layers_every=1)
    slopes = iter([NAN, 5.0, 4.0, 5.0, 5.0, NAN, 5.0])

    def closure() -> None:
        optimizer.zero_grad()
        (weight[0] * next(slopes)).backward()

    for expected in (-1.0, -2.0, -2.0):
        optimizer.step(closure)
        for other in others:
            other.step()
        assert weight.tolist() == pytest.approx([expected, 0.0], rel=1e-6)
    assert grad_of(weight).isnan().any()
    assert not hasattr(optimizer, "grad_scale")
    with pytest.raises(StopIteration):  # from the second call
        optimizer.step(closure)
    assert [(r.step, r.skipped) for r in clipper.history] == [
        *[(0, True), (0, False)],
        *[(1, False), (1, False)],
        *[(2, False), (2, True)],
    ]
    assert [r.total_norm for r in clipper.history][1:5] == [5.0, 4.0, 5.0, 5.0]
    of_steps = [max(norms) for norms in clipper.history.layers.norms]
    assert of_steps == pytest.approx([5.0, 5.0, NAN], nan_ok=True)  # those of the last call


class Asking(torch.optim.SGD):
    """Calls its closure with arguments, one of which has the name of its own."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure(0.5, closure=2.0)
        super().step()
        return loss


class OfModel(torch.optim.SGD):
    """Takes a callable that is no closure."""

    def step(self, model: Any) -> Any:  # type: ignore[override]
        assert model is not None
        return super().step()


class AfterModel(torch.optim.SGD):
    """Takes a closure that is not the first argument."""

    def step(self, model: Any, closure: Any = None) -> Any:  # type: ignore[override]
        assert isinstance(model, nn.Module)
        return super().step(closure)


class Anything(torch.optim.SGD):
    """Passes on all its arguments."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)


class OtherName(torch.optim.SGD):
    """Takes a closure under another name."""

    def step(self, evaluate: Any = None, *, loss_closure: Any = None) -> Any:
        return super().step(evaluate or loss_closure)


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (Asking, lambda step, closure: step(closure)),
        (Asking, lambda step, closure: step(closure=closure)),
        (AfterModel, lambda step, closure: step(nn.Linear(1, 1), closure)),
        (AfterModel, lambda step, closure: step(nn.Linear(1, 1), closure=closure)),
        (AfterModel, lambda step, closure: step(model=nn.Linear(1, 1), closure=closure)),
        (Anything, lambda step, closure: step(closure)),
        (Anything, lambda step, closure: step(closure=closure)),
        (OtherName, lambda step, closure: step(loss_closure=closure)),
    ],
)
def test_the_closure_is_found_where_the_signature_has_it(kind: Any, call: Callable[..., Any]) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = kind([weight], lr=1.0)
    clipper = Clipper(optimizer, 1.0)

    def closure(slope: float = 1.0, closure: float = 1.0) -> Tensor:
        optimizer.zero_grad()
        loss = (weight * torch.tensor([3.0, 4.0])).sum() * slope * closure
        loss.backward()
        return loss

    call(optimizer.step, closure)
    assert weight.tolist() == pytest.approx([-0.6, -0.8])
    assert [r.total_norm for r in clipper.history] == [5.0]


@pytest.mark.parametrize(
    "takes",
    [nn.Linear(1, 1), lambda step: 0.1 / step, torch.optim.lr_scheduler.StepLR],
    ids=["module", "function", "class"],
)
def test_what_can_be_called_is_not_always_a_closure(takes: Any) -> None:
    optimizer = OfModel(with_gradients([torch.tensor([3.0, 4.0])]), lr=1.0)
    clipper = Clipper(optimizer, 1.0)
    optimizer.step(takes)
    optimizer.step(model=takes)
    assert grad_norms(optimizer) == pytest.approx([1.0], rel=1e-5)
    assert [r.total_norm for r in clipper.history] == pytest.approx([5.0, 1.0])


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_within_a_step_is_part_of_it(fails: bool) -> None:
    class Outer(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if fails:
                with interrupted_sgd():
                    super().step(closure)
            return super().step(closure)

    optimizer = Outer(with_gradients([torch.tensor([3.0, 4.0])]), lr=1.0)
    plain = torch.optim.SGD(with_gradients([torch.tensor([1.0])]), lr=1.0)
    Clipper(plain, 1.0)  # puts hooks into SGD.step
    clipper = Clipper(optimizer, 1.0)
    for _ in range(2):
        optimizer.param_groups[0]["params"][0].grad = torch.tensor([3.0, 4.0])
        optimizer.step()
        assert grad_norms(optimizer) == pytest.approx([1.0])
    assert [(r.step, r.total_norm) for r in clipper.history] == [(0, 5.0), (1, 5.0)]


def test_two_clippers_in_one_step_do_not_take_each_others_for_their_own() -> None:
    inner = sgd([torch.tensor([6.0, 8.0])])

    class Outer(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            inner.step()
            return super().step(closure)

    outer = Outer(with_gradients([torch.tensor([3.0, 4.0])]), lr=1.0)
    clippers = Clipper(outer, 1.0), Clipper(inner, 2.0)
    for _ in range(2):
        outer.step()
    assert grad_norms(inner) == pytest.approx([2.0])
    assert [len(c.history) for c in clippers] == [2, 2]


# Steps that are not training's


@pytest.mark.parametrize(
    ("make", "scope"),
    [
        (lambda ps: torch.optim.Adam(ps), "global"),
        (lambda ps: torch.optim.Adam(ps, lr=torch.tensor(1e-3)), "group"),
        (lambda ps: torch.optim.AdamW(ps, fused=True), "parameter"),
        (lambda ps: torch.optim.SGD(ps, lr=0.1), "global"),
        (lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, fused=True), "group"),
        (lambda ps: torch.optim.Adagrad(ps, lr=0.1), "parameter"),
    ],
)
def test_the_step_that_creates_an_optimizers_state_is_none_of_trainings(make: Any, scope: Scope) -> None:
    def refuse(record: object) -> None:
        raise AssertionError(record)

    saved: Any = None
    for policy in ("propagate", "error"):
        model = Net()
        optimizer = make(model.parameters())
        clipper = Clipper(optimizer, Percentile(), scope=scope, nonfinite=policy, on_clip=refuse)
        if saved is None:
            saved = state_dict.get_optimizer_state_dict(model, optimizer)
        else:
            state_dict.set_optimizer_state_dict(model, optimizer, saved)
        assert (clipper.last, clipper.state_dict()["steps"]) == (None, 0)
        assert all(t.state_dict()["norms"] == [] for t in clipper.thresholds.values())


@pytest.mark.parametrize("several", [False, True])
def test_the_first_step_after_one_that_creates_state_is_recorded(several: bool) -> None:
    weights = with_gradients([torch.zeros(2)] * (1 + several))
    optimizers = [torch.optim.SGD([weight], lr=0.1, momentum=0.9) for weight in weights]
    clipper = Clipper(optimizers, 1.0)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step(closure=None)
        optimizer.param_groups[0]["lr"] = 0.1
    for number in range(2):
        for weight in weights:
            weight.grad = torch.tensor([3.0, 4.0])
        for optimizer in optimizers:
            optimizer.step()
        assert [r.total_norm for r in clipper.history] == pytest.approx(
            [5.0 * (1 + several) ** 0.5] * (number + 1)
        )


@pytest.mark.parametrize(
    ("lr", "value", "arguments"),
    [(0.1, 0.0, {"closure": None}), (0.0, 3.0, {"closure": None}), (0.0, 0.0, {})],
)
def test_a_step_of_training_with_zeros_is_one(lr: float, value: float, arguments: dict[str, Any]) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=lr)
    clipper = Clipper(optimizer, lambda step: 1.0 + step)
    for _ in range(2):
        weight.grad = torch.full((2,), value)
        optimizer.step(**arguments)
    assert [(r.step, r.max_norm) for r in clipper.history] == [(0, 1.0), (1, 2.0)]
