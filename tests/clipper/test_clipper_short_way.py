"""The fast path of a usual step and the full path give the same bits, with any unusual addition."""

import copy
import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

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


make_clipper: Callable[..., Clipper] = Clipper


class Run:
    """A step of an optimizer, before which something unusual may happen."""

    def __init__(self) -> None:
        self.parameters = [
            nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate([(5,), (3, 4), (2,)])
        ]
        for i, parameter in enumerate(self.parameters):
            parameter.grad = randn(*parameter.shape, seed=10 + i)
        self.kind: Any = torch.optim.SGD
        self.options: dict[str, Any] = {"lr": 0.1}
        self.groups: list[dict[str, Any]] = [{"params": self.parameters}]
        self.max_norm: Any = 0.5
        self.before: Callable[[torch.optim.Optimizer], None] = lambda optimizer: None
        self.within: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.arguments: tuple[Any, ...] = ()

    def add(self, grad: Tensor | None, like: Tensor | None = None) -> None:
        like = grad if like is None else like
        assert like is not None
        self.parameters.append(nn.Parameter(torch.zeros(like.shape, dtype=like.dtype)))
        self.parameters[-1].grad = grad

    def __call__(self) -> Any:
        optimizer = self.kind(self.groups, **self.options)
        clipper = make_clipper(optimizer, self.max_norm)
        self.before(optimizer)
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
            repr(list(clipper.history)),
        )


def set_option(**options: Any) -> Callable[[Run], None]:
    return lambda run: run.options.update(options)


def set_max_norm(max_norm: Any) -> Callable[[Run], None]:
    return lambda run: setattr(run, "max_norm", max_norm)


def in_two_groups(run: Run) -> None:
    run.groups = [{"params": run.parameters[:1]}, {"params": run.parameters[1:]}]


def with_own_max_norm(value: Any) -> Callable[[Run], None]:
    def add(run: Run) -> None:
        in_two_groups(run)
        run.groups[0]["max_norm"] = value

    return add


def share(run: Run) -> None:
    run.add(None, torch.zeros(5))
    run.parameters[-1].grad = run.parameters[0].grad


def spoil(value: float) -> Callable[[Run], None]:
    def put(run: Run) -> None:
        grad = run.parameters[1].grad
        if grad is not None:
            grad[0, 0] = value

    return put


def take_all_away(run: Run) -> None:
    for parameter in run.parameters:
        parameter.grad = None


def zero_all(run: Run) -> None:
    for parameter in run.parameters:
        if parameter.grad is not None:
            parameter.grad.zero_()


def with_closure(run: Run) -> None:
    run.arguments = (lambda: torch.tensor(1.0),)


def with_scale(run: Run) -> None:
    run.options["fused"] = True
    run.before = lambda optimizer: setattr(optimizer, "grad_scale", torch.tensor(2.0))


THINGS: dict[str, Callable[[Run], None]] = {
    "nothing": lambda run: None,
    "a larger threshold": set_max_norm(100.0),
    "0": set_max_norm(0),
    "inf": set_max_norm(INF),
    "a callable": set_max_norm(lambda step: 0.5),
    "a percentile": set_max_norm(Percentile(0)),
    "a z-score": set_max_norm(ZScore(warmup=1, threshold=0.0, clip_option="mean", max_norm=0.5)),
    "deviations": set_max_norm(RollingSigma()),
    "by value": set_max_norm(Value(0.5)),
    "by mean square": set_max_norm(BlockRMS(0.5)),
    "adaptively": set_max_norm(Adaptive(0.1)),
    "no gradient": lambda run: run.add(None, torch.zeros(3)),
    "no gradient at all": take_all_away,
    "zeros": zero_all,
    "an empty gradient": lambda run: run.add(torch.zeros(0, 3)),
    "float64": lambda run: run.add(randn(4, dtype=torch.float64)),
    "float16": lambda run: run.add(randn(4, dtype=torch.float16)),
    "bfloat16": lambda run: run.add(randn(4, dtype=torch.bfloat16)),
    "complex": lambda run: run.add(randn(4, dtype=torch.complex64)),
    "another order of strides": lambda run: run.add(randn(4, 3).t()),
    "gaps": lambda run: run.add(randn(4, 6)[:, ::2]),
    "expanded": lambda run: run.add(torch.ones(1).expand(4)),
    "sparse": lambda run: run.add(torch.eye(3).to_sparse(), torch.zeros(3, 3)),
    "a subclass": lambda run: run.add(randn(4).as_subclass(Own)),
    "shared": share,
    "many elements": lambda run: run.add(randn(70_000)),
    "inf in it": spoil(INF),
    "nan in it": spoil(NAN),
    "large numbers": spoil(1e38),
    "two groups": in_two_groups,
    "its own threshold": with_own_max_norm(0.1),
    "its own threshold of None": with_own_max_norm(None),
    "fused": set_option(fused=True),
    "momentum": set_option(momentum=0.9),
    "a closure": with_closure,
    "a scale": with_scale,
    "a function mode": lambda run: setattr(run, "within", Passing),
    "a dispatch mode": lambda run: setattr(run, "within", Dispatching),
}


def outcome(*things: str) -> Any:
    run = Run()
    for thing in things:
        THINGS[thing](run)
    return run()


@pytest.mark.parametrize("first", THINGS)
def test_both_ways_are_the_same(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for second in list(THINGS)[list(THINGS).index(first) :]:
        torch.manual_seed(0)
        short = outcome(first, second)
        with monkeypatch.context() as patch:
            patch.setattr(native, "step_state", lambda *_: None)
            full = outcome(first, second)
        assert short == full, (first, second)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each step of a ``Run`` went the short way."""
    found: list[bool] = []

    def watched(optimizer: torch.optim.Optimizer, *args: Any, **options: Any) -> Clipper:
        clipper = Clipper(optimizer, *args, **options)
        optimizer.register_step_pre_hook(lambda *_: found.append(cast("Any", clipper._state).went_short))
        return clipper

    monkeypatch.setitem(globals(), "make_clipper", watched)
    return found


def test_what_is_usual_goes_the_short_way(taken: list[bool]) -> None:
    usual = ["nothing", "a larger threshold", "inf", "no gradient", "two groups", "fused", "momentum"]
    usual += ["float64", "float16", "bfloat16", "complex", "another order of strides", "an empty gradient"]
    usual += ["large numbers", "shared", "0", "zeros", "gaps", "many elements", "a percentile", "a z-score"]
    usual += ["deviations", "by value", "by mean square", "adaptively"]
    for first, second in itertools.combinations(usual, 2):
        taken.clear()
        outcome(first, second)
        # Torch's fused steps refuse complex numbers, which have no order for "by value" either.
        count = {frozenset(["fused", "complex"]): 1, frozenset(["by value", "complex"]): 0}
        expected = [True] * count.get(frozenset([first, second]), 2)
        if {first, second} == {"adaptively", "shared"}:  # of which weights, the kernel does not decide
            expected = [False, False]
        assert taken == expected, (first, second)
    for thing in THINGS.keys() - set(usual):
        taken.clear()
        outcome(thing)
        assert not any(taken), thing


@pytest.mark.parametrize(
    "options",
    [
        {"norm_type": 1.0},
        {"scope": "group"},
        {"on_clip": lambda record: None},
        {"skip_above": 1.0},
        {"layers_every": 1},
    ],
)
def test_what_a_clipper_is_asked_for_beyond_the_usual(options: dict[str, Any], taken: list[bool]) -> None:
    run = Run()
    optimizer = torch.optim.SGD(run.parameters, lr=0.1)
    clipper = make_clipper(optimizer, 0.5, **options)
    optimizer.step()
    assert taken == [False]
    assert math.isfinite(clipper.history[0].total_norm)


def test_each_parameter_by_its_own_norm(taken: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [Run(), Run()]
    records = []
    for run in runs:
        run.add(torch.zeros(0, 3))
        run.add(torch.zeros(2))
        optimizer = torch.optim.SGD(run.parameters, lr=0.1)
        clipper = make_clipper(optimizer, 1.2, scope="parameter")
        optimizer.step()
        records += list(clipper.history)
        monkeypatch.setattr(native, "step_state", lambda *_: None)
    assert taken == [True, False]
    for ours, theirs in zip(runs[0].parameters, runs[1].parameters, strict=True):
        assert bits(ours) == bits(theirs)
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (bits(ours.grad), ours.grad._version) == (bits(theirs.grad), theirs.grad._version)
    for short, full in zip(*records, strict=True):
        assert short == full or short == pytest.approx(full, rel=1e-15)


def test_a_rule_may_change_its_threshold(taken: list[bool]) -> None:
    for rule, name in [
        (Value(100.0), "clip_value"),
        (BlockRMS(100.0), "max_rms"),
        (Adaptive(100.0), "clip_factor"),
    ]:
        run = Run()
        optimizer = torch.optim.SGD(run.parameters, lr=0.1)
        clipper = make_clipper(optimizer, rule)
        optimizer.step()
        setattr(rule, name, 0.01)
        optimizer.step()
        assert [record.clipped for record in clipper.history] == [False, True]
    assert taken == [True] * 6


def test_a_threshold_is_asked_once_and_its_error_calls_the_step_off(taken: list[bool]) -> None:
    class Failing(ZScore):
        """In a module of the package, like its own thresholds."""

    Failing.__module__ = "torchclip.thresholds.zscore"
    run, seen = Run(), []

    def learn(self: Any, norms: float, *_: Any) -> float:
        seen.append(norms)
        if len(seen) == 2:
            raise KeyError(norms)
        return 0.5

    vars_of_failing: Any = Failing
    vars_of_failing._learn = learn
    vars_of_failing.__abstractmethods__ = frozenset()
    optimizer = torch.optim.SGD(run.parameters, lr=0.1)
    clipper = make_clipper(optimizer, Failing())
    optimizer.step()
    before = [bits(p) for p in run.parameters]
    with pytest.raises(KeyError):
        optimizer.step()
    assert [bits(p) for p in run.parameters] == before
    optimizer.step()
    assert [record.step for record in clipper.history] == [0, 1]
    assert len(seen) == 3


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
