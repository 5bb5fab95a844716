"""Which arguments are refused, with which message, and that nothing has changed afterwards."""

import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from functions import CHANGING, FUNCTIONS, Function
from helpers import bits, grad_of, with_gradients
from torch import Tensor, nn

import torchclip

pytestmark = pytest.mark.usefixtures("kernel_on_and_off")

numbers = pytest.mark.parametrize(
    ("function", "number"),
    [pytest.param(f, n, id=f"{f.name}-{n}") for f in FUNCTIONS.values() for n in f.numbers],
)
orders = pytest.mark.parametrize(
    "function", [pytest.param(f, id=f.name) for f in FUNCTIONS.values() if f.takes_order]
)
functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=list(FUNCTIONS))


@pytest.fixture
def parameters() -> Iterator[list[Any]]:
    """Three of them; the test fails if anything about their gradients changes."""
    gradients = [
        torch.tensor([3.0, 4.0]),
        torch.tensor([5.0], dtype=torch.float64),
        torch.tensor([7.0]).half(),
    ]
    parameters = with_gradients(gradients)
    before = [bits(g) for g in gradients]
    yield parameters
    assert [bits(p.grad) for p in parameters] == before
    assert [p.grad._version for p in parameters] == [0, 0, 0]


class AsFloat:
    def __float__(self) -> float:
        return 2.0


class AsIndex:
    def __index__(self) -> int:
        return 2


class Several:
    def __float__(self) -> float:
        raise TypeError("only arrays of one element can be converted")


NOT_NUMBERS: list[Any] = [
    *(None, "abc", "", "1,5", "nan", b"1", [1.0], (1.0,), {}, 1j, True, torch.ones(2), torch.tensor(1j)),
    *(torch.ones((), device="meta"), Several(), object()),
]
NEGATIVE: list[Any] = [-1, -1e-300, -math.inf, np.float32(-1), torch.tensor(-1.0)]
NANS: list[Any] = [math.nan, np.float64("nan"), torch.tensor(math.nan)]
BEYOND_FLOAT64: list[Any] = [10**5000, Fraction(-(10**400))]


@numbers
def test_what_a_number_cannot_be(function: Function, number: str, parameters: list[Any]) -> None:
    refused: list[tuple[list[Any], type[Exception], str]] = [
        (NOT_NUMBERS, TypeError, "must be a number, got "),
        (NEGATIVE, ValueError, "must be at least 0, got -"),
        (BEYOND_FLOAT64, ValueError, "must be within the range of float64, got a la"),
    ]
    if number == "total_norm":  # it may be nan, and does not come from a configuration file
        refused.append((["1.0", "inf", "1e-3"], TypeError, "must be a number, got "))
    else:
        refused.append((NANS, ValueError, "must be at least 0, got nan"))
    for values, error, message in refused:
        for value in values:
            with pytest.raises(error, match=f"^`{number}` {message}"):
                function.of(parameters, **{number: value})


def test_the_remedy_for_max_norm_none(parameters: list[Any]) -> None:
    nothing: Any = None
    with pytest.raises(
        TypeError, match=r"got None \(NoneType\); to measure without clipping pass float\('inf'\)"
    ):
        torchclip.clip_grad_norm_(parameters, nothing)


KINDS: list[Any] = [
    2,
    np.float32(2),
    np.float16(2),
    np.int64(2),
    Fraction(2),
    Decimal(2),
    AsFloat(),
    AsIndex(),
]
KINDS += [torch.tensor(2), torch.tensor([2.0]), torch.tensor(2.0, requires_grad=True)]
KINDS += [np.array(2.0), np.array([2.0])]


def assert_same_as(function: Function, argument: str, value: Any, same: Any) -> None:
    """Two values of an argument mean the same."""
    mine, others = (with_gradients([torch.tensor([30.0, -40.0]), torch.tensor([5.0])]) for _ in range(2))
    assert repr(function.of(mine, **{argument: value})) == repr(function.of(others, **{argument: same}))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(mine, others, strict=True))


@numbers
def test_what_a_number_can_be(function: Function, number: str) -> None:
    for value in KINDS:
        assert_same_as(function, number, value, 2.0)
    for text in () if number == "total_norm" else ("1.0", "1e-3", " 2 ", "inf", "1_0"):
        assert_same_as(function, number, text, float(text))


NO_ORDERS: list[Any] = [None, "fro", "nan", "", [2], 1j, False, torch.ones(2), {}]
NAN_ORDERS: list[Any] = [math.nan, np.float32("nan")]
# What means the same order.
ORDERS: list[tuple[float, list[Any]]] = [
    (math.inf, ["inf"]),
    (-math.inf, ["-inf"]),
    (3.0, [np.float32(3), torch.tensor(3)]),
    (2.0, ["2", AsFloat(), AsIndex()]),
]


@orders
def test_orders(function: Function, parameters: list[Any]) -> None:
    for order in NO_ORDERS:
        with pytest.raises(TypeError, match=r"^`norm_type` must be a number or 'inf', got .*\)$"):
            function.of(parameters, norm_type=order)
    for order in NAN_ORDERS:
        with pytest.raises(ValueError, match=r"`norm_type` is nan; pass a number such as 2.0, or 'inf'"):
            function.of(parameters, norm_type=order)
    for same, alike in ORDERS:
        for order in alike:
            assert_same_as(function, "norm_type", order, same)


MODEL = nn.Linear(2, 1)
NOT_TENSORS: dict[str, tuple[Any, str]] = {
    "a module": (MODEL, r"is a module \(Linear\); pass its `\.parameters\(\)`"),
    "an optimizer": (
        torch.optim.SGD(MODEL.parameters(), lr=0.1),
        r"is an optimizer \(SGD\); pass the model's",
    ),
    "a dictionary": (
        {"weight": MODEL.weight},
        r"must be .* iterable of tensors, got \{'weight'.*; pass its values",
    ),
    "a parameter group": ({"params": [MODEL.weight]}, r"must be .* got \{'params'.*; pass its `params`"),
    "None": (None, r"must be a tensor or an iterable of tensors, got None"),
    "a number": (1.0, r"must be a tensor or an iterable of tensors, got 1\.0 \(float\)"),
    "a string": ("weight", r"must be a tensor or an iterable of tensors, got 'weight'"),
    "a bound method": (MODEL.parameters, r"must be .* iterable of tensors, got <bound method.*; call it"),
    "an array": (np.ones(3), r"must be a tensor or an iterable of tensors, got array"),
    "a 0-dim array": (np.array(1.0), r"must be a tensor or an iterable of tensors, got array"),
    "a ParameterDict": (nn.ParameterDict({"a": MODEL.weight}), r"is a module \(ParameterDict\)"),
}


@functions
@pytest.mark.parametrize("kind", NOT_TENSORS)
def test_what_is_no_collection_of_tensors(function: Function, kind: str) -> None:
    value, message = NOT_TENSORS[kind]
    if kind in ("a module", "a ParameterDict") and function.changes:
        return  # stands for its parameters
    with pytest.raises(TypeError, match=f"^`{function.takes}` {message}"):
        function(value)


@functions
@pytest.mark.parametrize(
    ("item", "remedy"),
    [
        (None, ""),
        (1.0, ""),
        ("weight", ""),
        (np.ones(2), ""),
        ([torch.ones(2)], "; pass all tensors in one list"),
        (MODEL.parameters(), "; pass all tensors in one list"),
        ({"params": [torch.ones(2)]}, "; pass its `params`"),
        (MODEL, r"; pass its `\.parameters\(\)`"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_items_that_are_no_tensors(function: Function, item: Any, remedy: str, parameters: list[Any]) -> None:
    tensors = parameters if function.changes else [torch.ones(2), torch.ones(2), torch.ones(2)]
    said = rf"^`{function.takes}` must hold tensors only, item 3 is .*\){remedy}$"
    with pytest.raises(TypeError, match=said):
        function([*tensors, item])
    with pytest.raises(TypeError, match=said):
        function(t for t in [*tensors, item])


@pytest.mark.parametrize("function", CHANGING.values(), ids=list(CHANGING))
def test_a_module_and_its_generator_stand_for_its_parameters(function: Function) -> None:
    passed: list[Callable[[nn.Module], Any]] = [
        lambda model: list(model.parameters()),
        lambda model: model,
        nn.Module.parameters,
        lambda model: iter(list(model.parameters())),
    ]
    found = []
    for pass_ in passed:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        (1000 * model(torch.ones(3))).sum().backward()
        given = pass_(model)
        result = function(given)
        found.append((repr(result), *(bits(grad_of(parameter)) for parameter in model.parameters())))
        assert not isinstance(given, Iterator) or list(given) == []
    assert found == [found[0]] * len(passed)


def test_errors_name_the_parameters_of_a_module() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 1)
    model = nn.Sequential(first, second)
    model(torch.ones(2)).sum().backward()
    assert second.weight.grad is not None
    second.weight.grad[0, 1] = math.inf
    with pytest.raises(RuntimeError, match=r"Non-finite: '1.weight' of shape \(1, 2\) \(1 inf, 0 nan\)"):
        torchclip.clip_grad_norm_(model, 1.0, error_if_nonfinite=True)
    first.bias.grad = torch.ones(1).expand(2)
    with pytest.raises(RuntimeError, match=r"'0.bias' of `parameters` has a gradient of shape \(2,\)"):
        torchclip.clip_grad_norm_(model, 1.0)


@functions
def test_named_parameters(function: Function) -> None:
    with pytest.raises(TypeError, match=r"item 0 is \('weight'.*; pass `.parameters\(\)`, not `.named_param"):
        function(MODEL.named_parameters())


def test_an_error_of_the_users_own_generator_comes_through(parameters: list[Any]) -> None:
    def broken() -> Iterator[Any]:
        yield parameters[0]
        raise KeyError("theirs")

    with pytest.raises(KeyError, match="theirs"):
        torchclip.clip_grad_norm_(broken(), 0.5)


def test_complex_gradients_have_no_order(parameters: list[Any]) -> None:
    (z,) = with_gradients([torch.tensor([1 + 2j])])
    with pytest.raises(TypeError, match=r"`parameters` has complex gradients, .* clip by norm instead"):
        torchclip.clip_grad_value_([*parameters, z], 0.5)


@pytest.mark.parametrize("grads", [[torch.ones(2, 3), torch.ones(3, 3)], [torch.ones(())]])
def test_numbers_of_examples_that_differ(grads: list[Tensor]) -> None:
    with pytest.raises(
        ValueError, match="must have the same number of examples along its first axis, got shapes"
    ):
        torchclip.clip_per_example(grads, 1.0)


@pytest.mark.parametrize("grad", [torch.ones(2, 3).to_sparse(), torch.ones(2, 3, dtype=torch.int64)])
def test_examples_that_are_sparse_or_whole_numbers(grad: Tensor) -> None:
    with pytest.raises(TypeError, match="`grads` must hold dense floating tensors, item 1 is torch"):
        torchclip.clip_per_example([torch.ones(2, 3), grad], 1.0)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_positional_arguments_stand_where_torchs_do(foreach: bool | None) -> None:
    results = []
    for module in (torchclip, nn.utils):
        (p,) = with_gradients([torch.tensor([3.0, -4.0])])
        norm = module.clip_grad_norm_(p, 6.0, 1, True, foreach)
        module.clip_grad_value_(p, 2.8, foreach)
        total_norm = module.get_total_norm([p.grad], 1, True, foreach)
        module.clip_grads_with_norm_(p, 0.5, total_norm, foreach)
        results.append((norm, total_norm, p.grad))
    torch.testing.assert_close(*results)
