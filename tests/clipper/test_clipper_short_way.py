"""The fast path of a usual step and the full path give the same bits, with any unusual addition."""

import copy
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from clipper_helpers import INF, NAN
from helpers import bits, randn
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchclip import (
    Adaptive,
    BlockRMS,
    Clipper,
    Percentile,
    RollingSigma,
    Value,
    ZScore,
    get_total_norm,
    kernel,
)
from torchclip._core import native
from torchclip.clipper import Scope
from torchclip.history.history import History

pytestmark = pytest.mark.skipif(not kernel.status().startswith("active"), reason="is the kernel's")


class Passing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Own(Tensor):
    """A subclass of a user's."""


class Run:
    """Two steps of an optimizer, before which something unusual may happen."""

    def __init__(self) -> None:
        self.parameters = [
            nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate([(5,), (3, 4), (2,)])
        ]
        for i, parameter in enumerate(self.parameters):
            parameter.grad = randn(*parameter.shape, seed=10 + i)
        self.options: dict[str, Any] = {"lr": 0.1}
        self.groups: list[dict[str, Any]] = [{"params": self.parameters}]
        self.max_norm: Any = 0.5
        self.scope: Scope = "global"
        self.grad_scale: Tensor | None = None
        self.within: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.arguments: tuple[Any, ...] = ()
        self.went_short: list[bool] | None = None  # what each step did, if it is a list

    def add(self, grad: Tensor | None, shape: Sequence[int] = ()) -> None:
        like = torch.zeros(shape) if grad is None or grad.is_sparse else grad
        self.parameters.append(nn.Parameter(torch.zeros(like.shape, dtype=like.dtype)))
        self.parameters[-1].grad = grad

    def __call__(self) -> Any:
        optimizer = torch.optim.SGD(self.groups, **self.options)
        clipper = Clipper(optimizer, self.max_norm, scope=self.scope)
        if (went_short := self.went_short) is not None:  # the hook runs after that of the Clipper
            state: Any = clipper._state
            optimizer.register_step_pre_hook(lambda *_: went_short.append(state.went_short))
        if self.grad_scale is not None:
            optimizer.grad_scale = self.grad_scale  # type: ignore[attr-defined]
        with self.within():
            for _ in range(2):
                try:
                    optimizer.step(*self.arguments)
                except (AssertionError, RuntimeError, TypeError) as error:
                    return type(error), [bits(p) for p in self.parameters], len(clipper.history)
        grads = [None if p.grad is None else p.grad.to_dense() for p in self.parameters]
        versions = [0 if p.grad is None else p.grad._version for p in self.parameters]
        return (
            [bits(p) for p in self.parameters],
            [None if g is None else bits(g) for g in grads],
            versions,
            # The norms of single parameters are joined in another order.
            [format(n, ".14g" if self.scope == "parameter" else "") for r in clipper.history for n in r[:4]],
            [record[4:] for record in clipper.history],
        )


def put(**attributes: Any) -> Callable[[Run], None]:
    return lambda run: vars(run).update(attributes)


def in_two_groups(run: Run, **first: Any) -> None:
    run.groups = [{"params": run.parameters[:1], **first}, {"params": run.parameters[1:]}]


def change(function: Callable[[Tensor], object]) -> Callable[[Run], None]:
    """Change the second gradient."""
    return lambda run: function(run.parameters[1].grad) if run.parameters[1].grad is not None else None  # type: ignore[return-value]


def take_all_away(run: Run) -> None:
    for parameter in run.parameters:
        parameter.grad = None


def zero_all(run: Run) -> None:
    for parameter in run.parameters:
        if parameter.grad is not None:
            parameter.grad.zero_()


def share(run: Run) -> None:
    run.add(None, (5,))
    run.parameters[-1].grad = run.parameters[0].grad


# The kernel takes steps with any two of these.
USUAL: dict[str, Callable[[Run], None]] = {
    "nothing": lambda run: None,
    "a larger threshold": put(max_norm=100.0),
    "0": put(max_norm=0),
    "inf": put(max_norm=INF),
    "a percentile": put(max_norm=Percentile(0)),
    "a z-score": put(max_norm=ZScore(warmup=1, threshold=0.0, clip_option="mean", max_norm=0.5)),
    "deviations": put(max_norm=RollingSigma()),
    "by value": put(max_norm=Value(0.5)),
    "by mean square": put(max_norm=BlockRMS(0.5)),
    "adaptively": put(max_norm=Adaptive(0.1)),
    "no gradient": lambda run: run.add(None, (3,)),
    "zeros": zero_all,
    "an empty gradient": lambda run: run.add(torch.zeros(0, 3)),
    "float64": lambda run: run.add(randn(4, dtype=torch.float64)),
    "float16": lambda run: run.add(randn(4, dtype=torch.float16)),
    "bfloat16": lambda run: run.add(randn(4, dtype=torch.bfloat16)),
    "complex": lambda run: run.add(randn(4, dtype=torch.complex64)),
    "another order of strides": lambda run: run.add(randn(4, 3).t()),
    "gaps": lambda run: run.add(randn(4, 6)[:, ::2]),
    "shared": share,
    "many elements": lambda run: run.add(randn(70_000)),
    "large numbers": change(lambda grad: grad[0].fill_(1e38)),
    "two groups": in_two_groups,
    "fused": lambda run: run.options.update(fused=True),
    "momentum": lambda run: run.options.update(momentum=0.9),
}
UNUSUAL: dict[str, Callable[[Run], None]] = {
    "a callable": put(max_norm=lambda step: 0.5),
    "no gradient at all": take_all_away,
    "expanded": lambda run: run.add(torch.ones(1).expand(4)),
    "sparse": lambda run: run.add(torch.eye(3).to_sparse(), (3, 3)),
    "a subclass": lambda run: run.add(randn(4).as_subclass(Own)),
    "inf in it": change(lambda grad: grad[0].fill_(INF)),
    "nan in it": change(lambda grad: grad[0].fill_(NAN)),
    "its own threshold": lambda run: in_two_groups(run, max_norm=0.1),
    "its own threshold of None": lambda run: in_two_groups(run, max_norm=None),
    "a closure": put(arguments=(lambda: torch.tensor(1.0),)),
    "a scale": lambda run: vars(run).update(grad_scale=torch.tensor(2.0), options={"lr": 0.1, "fused": True}),
    "a function mode": put(within=Passing),
    "a dispatch mode": put(within=Dispatching),
    "each parameter": put(scope="parameter"),  # which the kernel takes where it can
}
THINGS = {**USUAL, **UNUSUAL}


def run_with(*things: str, went_short: list[bool] | None = None) -> Any:
    run = Run()
    run.went_short = went_short
    for thing in things:
        THINGS[thing](run)
    return run()


@pytest.mark.parametrize("first", THINGS)
def test_both_ways_are_the_same(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for second in list(THINGS)[list(THINGS).index(first) :]:
        short = run_with(first, second)
        with monkeypatch.context() as patch:
            patch.setattr(native, "step_state", lambda *_: None)
            full = run_with(first, second)
        assert short == full, (first, second)


def test_what_is_usual_goes_the_short_way() -> None:
    # Torch's fused steps refuse complex numbers, which have no order for "by value" either.
    count = {frozenset(["fused", "complex"]): 1, frozenset(["by value", "complex"]): 0}
    for first, second in itertools.combinations(USUAL, 2):
        taken: list[bool] = []
        run_with(first, second, went_short=taken)
        # The kernel does not decide by which of several weights a shared gradient is clipped.
        short = {first, second} != {"adaptively", "shared"}
        assert taken == [short] * count.get(frozenset([first, second]), 2), (first, second)
    for thing in UNUSUAL.keys() - {"each parameter"}:
        run_with(thing, went_short=(taken := []))
        assert not any(taken), thing


def test_hooks_that_trade_gradients_are_heeded_in_the_next_step() -> None:
    run = Run()
    optimizer = torch.optim.SGD(run.parameters, lr=0.0)
    clipper = Clipper(optimizer, 0.5)

    def trade(*_: Any) -> None:
        for parameter in run.parameters:
            parameter.grad = torch.full_like(parameter, 2.0)

    optimizer.register_step_post_hook(trade)
    for _ in range(3):
        optimizer.step()
    count = sum(p.numel() for p in run.parameters)
    assert [r.total_norm for r in clipper.history][1:] == pytest.approx([2 * count**0.5] * 2)


def test_the_history_is_whole_however_steps_and_readers_take_turns() -> None:
    run = Run()
    optimizer = torch.optim.SGD(run.parameters, lr=0.0)
    clipper = Clipper(optimizer, 0.5)
    norms: list[float] = []

    def step(count: int, **attributes: Any) -> None:
        for _ in range(count):
            for parameter in run.parameters:
                parameter.grad = torch.full_like(parameter, 1.0 + len(norms))
            norms.append(float(get_total_norm([p.grad for p in run.parameters if p.grad is not None])))
            optimizer.step(**attributes)

    step(1200)  # more than are kept before they are recorded
    assert [record.step for record in clipper.history] == list(range(1200))
    step(3)
    step(2, closure=lambda: None)  # not usual
    step(3)
    assert [record.total_norm for record in clipper.history] == pytest.approx(norms)
    step(2)
    saved, copied = clipper.state_dict(), copy.deepcopy(clipper.history)
    step(2)
    assert len(copied) == 1210
    clipper.load_state_dict(saved)
    assert [record.step for record in clipper.history] == list(range(1210))
    first = clipper.history
    step(2)
    clipper.history = History(maxlen=5)
    step(6)
    assert [record.step for record in first] == list(range(1212))
    assert [record.step for record in clipper.history] == list(range(1213, 1218))
    assert clipper.history.summary().steps == 6
