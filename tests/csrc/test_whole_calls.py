"""The kernel does a usual call as a whole, with the same bits as where Python goes through the steps.

What unusual calls give is tested with and without the kernel in tests/_core and tests/clip_grad.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import subprocess
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import pytest
import torch
from helpers import DTYPES, bits, randn, with_gradients
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode

import torchclip
from torchclip import kernel
from torchclip._core import native

_kernel = pytest.importorskip("torchclip._kernel")
if kernel.status().startswith("off"):
    pytest.skip(f"the kernel is {kernel.status()}", allow_module_level=True)

SHAPES = [(3, 4), (5,), (), (200, 90), (2, 3, 2)]


@dataclass
class Call:
    """A call of one of the functions, usual at first."""

    parameters: Any
    limit: Any = 1.0
    keywords: dict[str, Any] = field(default_factory=dict)

    def norm(self) -> Any:
        return torchclip.clip_grad_norm_(self.parameters, self.limit, **self.keywords)

    def value(self) -> Any:
        return torchclip.clip_grad_value_(self.parameters, self.limit)


@functools.cache  # as drawing them takes longer than a call
def numbers(dtype: torch.dtype) -> list[Tensor]:
    return [randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(SHAPES)]


def usual(dtype: torch.dtype = torch.float32) -> Call:
    return Call(with_gradients([grad.clone() for grad in numbers(dtype)]))


def gradient(make: Callable[[], Tensor]) -> Callable[[Call], None]:
    """Adds a parameter with its own gradient."""

    def add(call: Call) -> None:
        grad = make()
        parameter = nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device), False)
        parameter.grad = grad
        call.parameters.append(parameter)

    return add


def with_limit(limit: Any) -> Callable[[Call], None]:
    return lambda call: setattr(call, "limit", limit)


def with_keyword(name: str, value: Any) -> Callable[[Call], None]:
    return lambda call: call.keywords.update({name: value})


def item(make: Callable[[], Any]) -> Callable[[Call], None]:
    return lambda call: call.parameters.append(make())


def shared(call: Call) -> None:
    parameter = nn.Parameter(torch.zeros(3, 4))
    parameter.grad = call.parameters[0].grad
    call.parameters.append(parameter)


# What can be added to a call, which is still usual then.
STILL_USUAL: dict[str, Callable[[Call], None]] = {
    "a parameter without a gradient": item(lambda: nn.Parameter(torch.zeros(3))),
    "an empty gradient": gradient(lambda: torch.empty(0, 3)),
    "float64": gradient(lambda: randn(5, dtype=torch.float64)),
    "bfloat16": gradient(lambda: randn(5, dtype=torch.bfloat16)),
    "other strides": gradient(lambda: randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
    "a threshold of integer type": with_limit(2),
    "no threshold": with_limit(math.inf),
    "a threshold of 0": with_limit(0.0),
    "an order of integer type": with_keyword("norm_type", 2),
    "foreach": with_keyword("foreach", True),
    "an error for what is not finite": with_keyword("error_if_nonfinite", True),
    "many elements": gradient(lambda: randn(70_000)),
    "beyond float64": gradient(lambda: torch.tensor([1e200], dtype=torch.float64)),
    "listed twice": lambda call: call.parameters.append(call.parameters[0]),
    "shared": shared,
}
UNUSUAL: dict[str, Callable[[Call], None]] = {
    "gaps": gradient(lambda: torch.ones(4, 6)[:, ::2]),
    "expanded": gradient(lambda: torch.ones(1).expand(3)),
    "integers": gradient(lambda: torch.ones(3, dtype=torch.int32)),
    "nan": gradient(lambda: torch.tensor([math.nan, 1.0])),
    "a negative threshold": with_limit(-1.0),
}


def run(call: Call, function: str) -> tuple[Any, ...]:
    """The outcome: the result, the bits of the gradients, and how often they were changed."""
    grads = [p.grad for p in call.parameters if p.grad is not None]
    before = [grad._version for grad in grads]
    result = getattr(call, function)()
    outcome = None if result is None else (result.dtype, result.device, bits(result))
    return outcome, [bits(g) for g in grads], [g._version - b for g, b in zip(grads, before, strict=True)]


@contextmanager
def step_by_step() -> Iterator[None]:
    """Has Python go through the steps of a call, each of which the kernel does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "clip_grad_norm", lambda *_: None)
        patch.setattr(native, "clip_grad_value", lambda *_: None)
        yield


def both(build: Callable[[], Call], function: str) -> None:
    whole = run(build(), function)
    with step_by_step():
        assert run(build(), function) == whole


def is_taken(call: Call, function: str = "norm") -> bool:
    """Whether the kernel does a call as a whole."""
    if function == "value":
        return _kernel.clip_grad_value(call.parameters, call.limit) is not None
    order, error = (call.keywords.get(k, d) for k, d in (("norm_type", 2.0), ("error_if_nonfinite", False)))
    return _kernel.clip_grad_norm(call.parameters, call.limit, order, error, None) is not None


@pytest.mark.parametrize("limit", [0.37, 1e9, 1e-42])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_a_whole_and_step_by_step_the_bits_are_the_same(dtype: torch.dtype, limit: float) -> None:
    def make() -> Call:
        call = usual(dtype)
        call.limit = limit
        return call

    assert is_taken(make(), "norm")
    assert is_taken(make(), "value") == (not dtype.is_complex)
    both(make, "norm")
    if not dtype.is_complex:
        both(make, "value")


@pytest.mark.parametrize("count", [1, 7, 8, 9, 127, 128, 129, 255, 256, 257, 5000])
def test_any_number_of_gradients(count: int) -> None:
    # Around powers of 2, where the table of repeated gradients is fullest and the stack's room ends.
    def make() -> Call:
        return Call(with_gradients([row.clone() for row in randn(count, 1)]), 1e-3)

    assert is_taken(make())
    assert is_taken(make(), "value")
    both(make, "norm")
    both(make, "value")


@pytest.mark.parametrize("function", ["norm", "value"])
@pytest.mark.parametrize("name", STILL_USUAL)
def test_what_is_usual_is_taken(name: str, function: str) -> None:
    def make() -> Call:
        call = usual()
        STILL_USUAL[name](call)
        return call

    assert is_taken(make(), function)
    both(make, function)


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_is_left_alone(name: str) -> None:
    call = usual()
    UNUSUAL[name](call)
    before = [bits(p.grad) for p in call.parameters]
    assert not is_taken(call)
    assert [bits(p.grad) for p in call.parameters] == before
    assert [p.grad._version for p in call.parameters] == [0] * len(before)


# Modules


# Methods that the walk stands for, and what each gives in place of all parameters of two layers.
PARTS: dict[str, Callable[[nn.Module], Any]] = {
    "parameters": lambda model: iter([model.get_parameter("1.bias")]),
    "named_parameters": lambda model: iter([("", model.get_parameter("0.weight"))]),
    "_named_members": lambda model: iter([("", model.get_parameter("1.bias"))]),
    "named_modules": lambda model: iter([("", model.get_submodule("1"))]),
}


def two_layers(kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    return kind(nn.Linear(3, 3), nn.Linear(3, 2))


def of_a_class_with_its_own(method: str) -> nn.Module:
    return two_layers(
        type("Overriding", (nn.Sequential,), {method: lambda self, *_, **__: PARTS[method](self)})
    )


def with_its_own(method: str) -> nn.Module:
    model = two_layers()
    object.__setattr__(model, method, lambda *_, **__: PARTS[method](model))
    return model


class Equal(nn.Linear):
    """Objects of one size are equal in a set."""

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal)


class Intercepting(nn.Linear):
    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return {"bias": found["bias"]} if name == "_parameters" and "bias" in found else found


class WithProperty(nn.Linear):
    @property
    def _parameters(self) -> Any:
        own = self.__dict__["_parameters"]
        return {"bias": own["bias"]} if "bias" in own else own

    @_parameters.setter
    def _parameters(self, value: Any) -> None:
        self.__dict__["_parameters"] = value


def shared_module() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(3, 3))


def shared_weights() -> nn.Module:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    model[1].weight = model[0].weight
    return model


def with_none() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3))
    model.register_module("nothing", None)
    return model


def circular() -> nn.Module:
    model = two_layers()
    model[0].add_module("back", model)
    return model


def ordered() -> nn.Module:
    model = two_layers()
    model[1]._parameters = OrderedDict(reversed(model[1]._parameters.items()))
    return model


def frozen() -> nn.Module:
    model = two_layers()
    model[0].requires_grad_(False)
    return model


def within(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(3, 3), make(), nn.Linear(3, 2))


# Whether a module, and the generator of its parameters, are walked without being run.
WALKED: dict[str, Callable[[], nn.Module]] = {
    "one layer": lambda: nn.Linear(3, 2),
    "nested": lambda: nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Tanh(), nn.Linear(2, 2)), nn.Tanh()),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "recurrent": lambda: nn.LSTM(3, 4, num_layers=2),
    "shared module": shared_module,
    "shared weights": shared_weights,
    "without some": with_none,
    "frozen": frozen,
    "parametrized": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2)),
    "a list in a module": lambda: nn.ModuleList([nn.Linear(2, 2), nn.ParameterList([torch.ones(2)])]),
    "a child's names": within(lambda: of_a_class_with_its_own("named_parameters")),
}
RUN: dict[str, Callable[[], nn.Module]] = {
    "a child's modules": within(lambda: of_a_class_with_its_own("named_modules")),
    "equal modules": lambda: nn.Sequential(Equal(3, 3), Equal(3, 3)),
    "__getattribute__": within(lambda: Intercepting(3, 3)),
    "a property": within(lambda: WithProperty(3, 3)),
    "circular": circular,
    "another dictionary": ordered,
    "of a list": lambda: nn.ParameterList([torch.ones(3), torch.ones(2)]),
    **{f"a class with its own {method}": partial(of_a_class_with_its_own, method) for method in PARTS},
    **{f"a module with its own {method}": partial(with_its_own, method) for method in PARTS},
}
MODULES = {**WALKED, **RUN}


def trained(make: Callable[[], nn.Module]) -> nn.Module:
    """The module with gradients."""
    torch.manual_seed(0)
    model = make()
    for i, parameter in enumerate({id(p): p for p in nn.Module.parameters(model)}.values()):
        if parameter.requires_grad:
            parameter.grad = randn(*parameter.shape, seed=i)
    return model


def all_gradients(model: nn.Module) -> list[bytes]:
    found: dict[int, Tensor] = {}
    for module in dict.fromkeys(iter_modules(model, set())):
        for parameter in module.__dict__["_parameters"].values():
            if parameter is not None and parameter.grad is not None:
                found[id(parameter)] = parameter.grad
    return [bits(grad) for grad in found.values()]


def iter_modules(module: nn.Module, seen: set[int]) -> Iterator[Any]:
    if id(module) not in seen:
        seen.add(id(module))
        yield module
        for child in module.__dict__["_modules"].values():
            if child is not None:
                yield from iter_modules(child, seen)


GIVEN: dict[str, Callable[[nn.Module], Any]] = {
    "the module": lambda model: model,
    "its generator": lambda model: model.parameters(),
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_the_list_of_its_parameters_walked_or_not(name: str, given: str) -> None:
    for function, limit in itertools.product(("norm", "value"), (0.3, 1e9)):
        model, same = trained(MODULES[name]), trained(MODULES[name])
        passed = GIVEN[given](model)
        got, wanted = (getattr(Call(p, limit), function)() for p in (passed, list(same.parameters())))
        assert given == "the module" or list(passed) == []
        assert (got is None) == (wanted is None)
        assert got is None or bits(got) == bits(wanted)
        assert all_gradients(model) == all_gradients(same)
    model = trained(MODULES[name])
    before = all_gradients(model)
    is_walked = is_taken(Call(GIVEN[given](model), 0.1))
    # Before Python 3.11 a generator does not show what it will yield.
    if given == "the module":
        assert is_walked == (name in WALKED)
    else:
        assert is_walked == (name in (*WALKED, "of a list") and hasattr(iter_nothing(), "gi_suspended"))
    assert (all_gradients(model) == before) == (not is_walked)


def iter_nothing() -> Iterator[None]:
    yield from ()


def test_attributes_that_are_in_no_dictionary() -> None:
    class Odd(nn.Module, functools.partial):  # type: ignore[type-arg]
        """Keeps its attributes in the given object."""

        def __init__(self, *_: Any) -> None:
            nn.Module.__init__(self)

    def odd(made: Any) -> Any:
        try:
            cast("Any", functools.partial).__setstate__(made, (print, (), {}, 42))
        except TypeError:  # from CPython 3.13.11 on
            pytest.skip("this Python refuses attributes that are in no dictionary")
        return made

    assert not is_taken(Call(odd(Odd(print))))
    assert not is_taken(Call(nn.Sequential(nn.Linear(2, 2), odd(Odd(print)))))


def started(model: nn.Module) -> Iterator[nn.Parameter]:
    generator = model.parameters()
    next(generator)
    return generator


def used_up(model: nn.Module) -> Iterator[nn.Parameter]:
    generator = model.parameters()
    list(generator)
    return generator


@pytest.mark.filterwarnings("ignore:.*empty generator")
@pytest.mark.parametrize(
    "make",
    [
        started,
        used_up,
        lambda model: model.parameters(recurse=False),
        lambda model: model.parameters(recurse=0),
        lambda model: model.parameters(1),
        lambda model: (p for _, p in model.named_parameters()),
        lambda model: model.buffers(),
        lambda model: iter(list(model.parameters())),
    ],
)
def test_other_generators_are_run(make: Callable[[nn.Module], Any]) -> None:
    model, same = trained(WALKED["nested"]), trained(WALKED["nested"])
    items = list(make(same))
    given = make(model)
    assert not is_taken(Call(given, 0.1))
    torchclip.clip_grad_norm_(given, 0.1)
    torchclip.clip_grad_norm_(items, 0.1)
    assert all_gradients(model) == all_gradients(same)
    assert list(given) == []


def test_a_generator_that_the_kernel_leaves_alone_is_still_whole() -> None:
    model = trained(WALKED["nested"])
    model[0].weight.grad[0] = math.nan  # type: ignore[index]
    generator = model.parameters()
    assert not is_taken(Call(generator))
    assert len(list(generator)) == len(list(model.parameters()))


# User code in the middle


class Meddling(TorchFunctionMode):
    """Does something to the gradients whenever one of them is read."""

    def __init__(self, meddle: Callable[[], None]) -> None:
        super().__init__()
        self.meddle = meddle

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "__get__":
            self.meddle()
        return result


@pytest.mark.parametrize("function", ["norm", "value"])
@pytest.mark.parametrize(
    "change",
    [
        lambda grad: grad.resize_(3).fill_(0.5),
        lambda grad: grad.set_(torch.full((4, 2), 0.5)),
        lambda grad: setattr(grad, "data", torch.full((70_000,), 0.5)),
        lambda grad: setattr(grad, "data", torch.full((5,), 0.5, dtype=torch.int32)),
        lambda grad: grad.fill_(0.25),
    ],
)
def test_a_getter_that_trades_the_memory_of_gradients(change: Callable[[Tensor], Any], function: str) -> None:
    call = usual()
    grads = [p.grad for p in call.parameters]
    done: list[Any] = []

    def meddle() -> None:
        if len(done) < 3:
            done.append(None)
            with torch._C.DisableTorchFunction():
                change(grads[0])
                change(grads[2])
            gc.collect()

    with Meddling(meddle):
        try:
            total_norm = getattr(call, function)()
        except TypeError:
            assert grads[0].dtype == torch.int32  # refused before anything was changed
            return
    if function == "norm":
        assert math.isclose(float(torchclip.get_total_norm(grads)), 1.0, rel_tol=1e-5)
        assert total_norm > 1
    else:
        assert max(float(grad.abs().max()) for grad in grads) <= 1.0


def test_a_finalizer_of_a_parameter_that_trades_the_memory_of_its_gradient() -> None:
    call = usual()
    grads = [p.grad for p in call.parameters]
    given = list(call.parameters)
    lost = weakref.finalize(given[1], lambda: grads[1].set_(torch.full_like(grads[1], 0.5)))
    call.parameters.clear()

    read: list[None] = []

    def meddle() -> None:
        read.append(None)
        if len(read) == len(grads):
            given.clear()  # from here on only the call keeps the parameters alive

    with Meddling(meddle):
        torchclip.clip_grad_norm_(given, 0.1)
    assert not lost.alive
    assert math.isclose(float(torchclip.get_total_norm(grads)), 0.1, rel_tol=1e-5)


@pytest.mark.parametrize("function", ["norm", "value"])
@pytest.mark.parametrize("limit", [0.1, 1e9])
def test_finalizers_that_trade_the_memory_of_gradients(limit: float, function: str) -> None:
    """Before Python 3.12 any allocation can run the garbage collector, which may run user code."""

    class Knot:
        def __init__(self) -> None:
            self.itself = self

    before = gc.get_threshold()
    gc.freeze()  # existing entries need not be checked each time
    for turn in range(60):
        call = usual()
        call.limit = limit
        grads = [p.grad for p in call.parameters]
        knots = [Knot() for _ in range(8)]
        number = itertools.count()

        def trade(_: object, grads: list[Tensor] = grads, number: Iterator[int] = number) -> None:
            which = grads[next(number) % len(grads)]
            which.data = which.data.clone()
            which.resize_(which.numel() + 1).fill_(0.01)

        references = [weakref.ref(knot, trade) for knot in knots]
        try:
            gc.set_threshold(1 + turn % 12)
            del knots
            getattr(call, function)()
        finally:
            gc.set_threshold(*before)
        gc.collect()
        assert all(reference() is None for reference in references)
        assert all(grad.isfinite().all() for grad in grads)


def test_a_getter_that_raises() -> None:
    def fail() -> None:
        raise KeyError("fail")

    with Meddling(fail), pytest.raises(KeyError, match="fail"):
        torchclip.clip_grad_norm_(usual().parameters, 1.0)


@pytest.mark.slow
def test_threads_with_a_small_stack() -> None:
    script = """
import threading
import torch, torchclip
from torch import nn
from torchclip import _kernel

def deep(depth):
    return nn.Sequential(deep(depth - 1)) if depth else nn.Linear(3, 3)

models = [nn.Sequential(*(nn.Sequential(nn.Linear(3, 3)) for _ in range(n))) for n in (1, 64, 700)]
models.append(deep(60))
for i, model in enumerate(models):
    for p in model.parameters():
        p.grad = torch.ones(*p.shape, 2)[..., 0] if i == 1 else torch.ones_like(p)
rules = (0.5, lambda norm: 0.5, torchclip.BlockRMS(0.5), torchclip.Value(0.5), torchclip.Adaptive(0.01))
steps = [torch.optim.SGD(models[1].parameters(), lr=0.1, foreach=False) for _ in rules]
clippers = [torchclip.Clipper(*pair) for pair in zip(steps, rules)]
batches = [_kernel.gradients(list(models[i].parameters())) for i in (0, 2, 3)]  # the second has gaps
for step in steps:
    step.step()  # what a first step imports needs more

def work():
    for model in models:
        for given in (model, model.parameters(), list(model.parameters()), iter(list(model.parameters()))):
            torchclip.clip_grad_norm_(given, 0.5)
            torchclip.clip_grad_value_(given, 1e-3)
        torchclip.clip_grad_norm_per_parameter_(model, 0.5)
        torchclip.clip_grad_rms_(model, 0.5)
        torchclip.clip_grad_adaptive_(model, 0.01)
    for batch in batches:
        numbers = [0.5] * len(batch.all)
        batch.norms(2.0, True)
        batch.scale_each_(numbers)
        batch.clip_each_(numbers, 2.0, 1e-6)
        batch.zero_nonfinite_()
    torchclip.clip_per_example([torch.ones(4, 8)], 1.0)
    for step in steps:
        step.step()
    done.append(True)

done = []
threading.stack_size(32 * 1024)
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert done
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


def test_references_are_given_back() -> None:
    model = trained(WALKED["nested"])
    grads = [p.grad for p in model.parameters()]
    before = [len(gc.get_referrers(grad)) for grad in grads]
    for given in (model, list(model.parameters())):
        for limit in (1e9, 0.1, -1.0):
            for call in (
                Call(given, limit),
                Call([*given.parameters(), 3] if given is model else given, limit),
            ):
                is_taken(call)
                is_taken(call, "value")
    call = None  # type: ignore[assignment]
    gc.collect()
    assert [len(gc.get_referrers(grad)) for grad in grads] == before
