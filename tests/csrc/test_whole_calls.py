"""Which calls the kernel does as a whole, and user code that runs in the middle of one.

What calls give, whole or not, is tested with the kernel and without it in tests/_core and tests/clip_grad.
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
from functools import partial
from typing import Any, cast

import pytest
import torch
from helpers import DTYPES, bits, randn, with_gradients
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import torchclip
from torchclip import kernel

_kernel = pytest.importorskip("torchclip._kernel")
if kernel.status().startswith("off"):
    pytest.skip(f"the kernel is {kernel.status()}", allow_module_level=True)

CLIP: dict[str, Callable[..., Any]] = {
    "norm": torchclip.clip_grad_norm_,
    "value": torchclip.clip_grad_value_,
}
# What the functions ask the kernel for first; None if it leaves the call to Python.
WHOLE: dict[str, Callable[[Any, Any], object]] = {
    "norm": lambda given, limit: _kernel.clip_grad_norm(given, limit, 2.0, False, None),
    "value": lambda given, limit: _kernel.clip_grad_value(given, limit),
    "per parameter": lambda given, limit: _kernel.clip_grad_each(given, limit, 1, False),
    "rms": lambda given, limit: _kernel.clip_grad_each(given, limit, 2.0, True),
    "adaptive": lambda given, limit: _kernel.clip_grad_adaptive(given, limit, 1e-3, 2.0, 1.0),
    "per example": lambda given, limit: _kernel.clip_per_example([p.grad[None] for p in given], limit),
}


def is_taken(name: str, given: Any, limit: Any = 1.0) -> bool:
    """Whether the kernel does a call as a whole."""
    return WHOLE[name](given, limit) is not None


# Gradients beside a usual one that are usual, too.
USUAL: dict[str, Callable[[], Tensor]] = {
    **{str(dtype): partial(randn, 3, 4, dtype=dtype) for dtype in DTYPES},
    "no axes": lambda: torch.tensor(3.0),
    "no elements": lambda: torch.empty(0, 3),
    "other strides": lambda: randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "many elements": lambda: randn(70_000),
}
# Which of them a rule leaves to Python.
LEFT_ALONE: dict[str, set[str]] = {
    "value": {"torch.complex64", "torch.complex128"},
    "per parameter": {"torch.complex64", "torch.complex128"},
    "rms": {"torch.float64", "torch.complex128"},
    "adaptive": {"torch.float64", "torch.complex128", "no elements"},
    "per example": {"other strides"},
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("kind", USUAL)
def test_usual_gradients_are_taken(name: str, kind: str) -> None:
    parameters = with_gradients([randn(5), USUAL[kind]()])
    assert is_taken(name, parameters) == (kind not in LEFT_ALONE.get(name, ()))


@pytest.mark.parametrize("name", ["norm", "value", "per parameter", "rms", "adaptive"])
def test_usual_calls_are_taken(name: str) -> None:
    one, other, without = with_gradients([randn(3, 4), randn(5), None])
    for given in ([one, other, without, one], (one, other), one, nn.Sequential(nn.Linear(3, 2), nn.Tanh())):
        for parameter in given.parameters() if isinstance(given, nn.Module) else ():
            parameter.grad = torch.ones_like(parameter)
        for limit in (1.0, 2, 0.0, math.inf):
            assert is_taken(name, given, limit)
        assert not is_taken(name, given, -1.0)
        assert not is_taken(name, given, torch.tensor(1.0))
    assert not is_taken(name, [without])
    sharing = nn.Parameter(torch.ones_like(one))
    sharing.grad = one.grad
    assert is_taken(name, [one, sharing]) == (name != "adaptive")
    with kernel.disabled():
        assert not is_taken(name, [one])


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


def within(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(3, 3), make(), nn.Linear(3, 2))


# Whether a module, and the generator of its parameters, are walked without being run.
WALKED: dict[str, Callable[[], nn.Module]] = {
    "nested": lambda: nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Tanh(), nn.Linear(2, 2)), nn.Tanh()),
    "shared module": shared_module,
    "shared weights": shared_weights,
    "without some": with_none,
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


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """All that there are, whatever the modules' methods and attributes say."""
    modules, found = [module], dict[int, nn.Parameter]()
    for each in modules:
        found.update((id(p), p) for p in each.__dict__["_parameters"].values() if p is not None)
        children = [child for child in each.__dict__["_modules"].values() if child is not None]
        modules += [child for child in children if not any(child is known for known in modules)]
    return list(found.values())


def trained(make: Callable[[], nn.Module]) -> nn.Module:
    """The module with gradients."""
    torch.manual_seed(0)
    model = make()
    for i, parameter in enumerate(own_parameters(model)):
        parameter.grad = randn(*parameter.shape, seed=i)
    return model


def all_gradients(model: nn.Module) -> list[bytes]:
    return [bits(p.grad) for p in own_parameters(model) if p.grad is not None]


GIVEN: dict[str, Callable[[nn.Module], Any]] = {
    "the module": lambda model: model,
    "its generator": lambda model: model.parameters(),
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_the_list_of_its_parameters_walked_or_not(name: str, given: str) -> None:
    for clip in CLIP.values():
        model, same = trained(MODULES[name]), trained(MODULES[name])
        passed = GIVEN[given](model)
        assert repr(clip(passed, 0.3)) == repr(clip(list(same.parameters()), 0.3))
        assert given == "the module" or list(passed) == []
        assert all_gradients(model) == all_gradients(same)
    model = trained(MODULES[name])
    before = all_gradients(model)
    is_walked = is_taken("norm", GIVEN[given](model), 0.1)
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

    assert not is_taken("norm", odd(Odd(print)))
    assert not is_taken("norm", nn.Sequential(nn.Linear(2, 2), odd(Odd(print))))


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
    given = make(model)
    assert not is_taken("norm", given, 0.1)
    torchclip.clip_grad_norm_(given, 0.1)
    torchclip.clip_grad_norm_(list(make(same)), 0.1)
    assert all_gradients(model) == all_gradients(same)
    assert list(given) == []


def test_a_generator_that_the_kernel_leaves_alone_is_still_whole() -> None:
    model = trained(WALKED["nested"])
    model[0].weight.grad[0] = math.nan  # type: ignore[index]
    generator = model.parameters()
    assert not is_taken("norm", generator)
    assert len(list(generator)) == len(list(model.parameters()))


# User code in the middle, references and the stack


@pytest.mark.parametrize("name", CLIP)
@pytest.mark.parametrize("limit", [0.1, 1e9])
def test_finalizers_that_trade_the_memory_of_gradients(limit: float, name: str) -> None:
    """Before Python 3.12 any allocation can run the garbage collector, which may run user code."""

    class Knot:
        def __init__(self) -> None:
            self.itself = self

    before = gc.get_threshold()
    gc.freeze()  # existing entries need not be checked each time
    for turn in range(60):
        grads = [randn(*shape) for shape in ((3, 4), (5,), (), (200, 90), (2, 3, 2))]
        parameters = with_gradients(grads)
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
            CLIP[name](parameters, limit)
        finally:
            gc.set_threshold(*before)
        gc.collect()
        assert all(reference() is None for reference in references)
        assert all(grad.isfinite().all() for grad in grads)


def test_references_are_given_back() -> None:
    model = trained(WALKED["nested"])
    held = [each for p in model.parameters() for each in (p, p.grad)]

    def counts() -> list[int]:
        return [sys.getrefcount(each) for each in held]

    def calls() -> None:
        parameters = list(model.parameters())
        calls = itertools.product(WHOLE, (parameters, [*parameters, *parameters]), (1e9, 0.1, -1.0))
        for name, given, limit in [*calls, ("norm", model, 0.1)]:
            is_taken(name, given, limit)
            if name != "per example":
                is_taken(name, [*given, 3] if given is not model else given, limit)

    calls()  # what it imports and keeps once
    before = counts()
    calls()
    assert counts() == before


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
batches = [_kernel.gradients(list(models[i].parameters())) for i in (0, 2, 3)]  # the second has gaps
torchclip.clip_grad_adaptive_(models[1], 0.01)  # what a first call imports needs more

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
        batch.norms(2.0)
        batch.scale_each_(numbers)
        batch.zero_nonfinite_()
    torchclip.clip_per_example([torch.ones(4, 8)], 1.0)
    done.append(True)

done = []
threading.stack_size(32 * 1024)
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert done
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)
