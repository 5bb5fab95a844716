"""The NumPy reference by itself: the book's function, formulas written out, and refusals."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from torchclip import reference
from torchclip.reference import Array

INF = math.inf
RNG = np.random.default_rng(0)


def arrays() -> list[Array]:
    return [RNG.standard_normal((3, 4)), RNG.standard_normal(5)]


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 100.0])
def test_is_the_books_formula(max_norm: float) -> None:
    grads = arrays()
    expected = [g.copy() for g in grads]
    total_norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
    rate = max_norm / (total_norm + 1e-6)
    if rate < 1:
        expected = [g * rate for g in expected]
    assert reference.clip_grads(grads, max_norm) == pytest.approx(total_norm, rel=1e-14)
    for a, b in zip(grads, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14)


@pytest.mark.parametrize("order", [-2, -1, 0.5, 1, 2, 3])
def test_the_norm_is_its_formula(order: Any) -> None:
    grads = arrays()
    joint = np.concatenate([g.ravel() for g in grads])
    assert reference.global_norm(grads, order) == pytest.approx(np.linalg.norm(joint, order), rel=1e-13)


def test_the_norms_without_a_formula() -> None:
    grads = [np.array([3.0, -4.0]), np.array([0.0])]
    assert reference.global_norm(grads, "inf") == reference.global_norm(grads, INF) == 4
    assert reference.global_norm(grads, "-inf") == 0
    assert reference.global_norm(grads[:1], -INF) == 3
    assert reference.global_norm(grads, 0) == 2
    assert reference.global_norm(grads, -1) == 0
    assert reference.global_norm([], 2) == reference.global_norm([np.zeros((0, 3))], INF) == 0
    assert reference.global_norm([np.array([3 + 4j])], 1) == 5


@pytest.mark.parametrize("number", [1e20, 1e-25])
def test_neither_overflows_nor_underflows(number: float) -> None:
    assert reference.global_norm([np.full(4, number, np.float32)]) == pytest.approx(2 * number, rel=1e-7)
    assert reference.global_norm([np.full(4, number**8)]) == pytest.approx(2 * number**8, rel=1e-12)


def test_nan_and_inf_spread() -> None:
    grads = [np.array([1.0, math.nan]), np.array([2.0])]
    assert math.isnan(reference.clip_grads(grads, 1.0))
    assert np.isnan(grads[1]).all()
    grads = [np.array([1.0, INF]), np.array([2.0])]
    assert reference.clip_grads(grads, 1.0) == INF
    assert grads[1].tolist() == [0]
    assert grads[0][0] == 0
    assert math.isnan(grads[0][1])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.complex64, np.complex128])
def test_arrays_keep_their_dtype_and_their_memory(dtype: Any) -> None:
    buffer = np.full(10, 4, dtype)
    view = buffer[2:9:2]
    reference.clip_grads([view], 4.0)
    assert buffer.dtype == dtype
    np.testing.assert_allclose(buffer, [4, 4, 2, 4, 2, 4, 2, 4, 2, 4], rtol=1e-3)


WEIGHT = np.ones(2)
COUNT_ONCE: dict[str, Callable[[list[Array]], Any]] = {
    "global_norm": reference.global_norm,
    "clip_grads": lambda grads: reference.clip_grads(grads, 1.0),
    "clip_grads_with_norm": lambda grads: reference.clip_grads_with_norm(grads, 1.0, 5.0),
    "clip_grad_norm_per_parameter": lambda grads: reference.clip_grad_norm_per_parameter(grads, 1.0),
    "clip_grad_adaptive": lambda grads: reference.clip_grad_adaptive([WEIGHT] * len(grads), grads, 0.1),
}


@pytest.mark.parametrize("name", COUNT_ONCE)
def test_an_array_listed_twice_counts_once(name: str) -> None:
    for values in ([3.0, 4.0], [INF, 4.0]):
        once, twice = np.array(values), np.array(values)
        assert COUNT_ONCE[name]([once]) == COUNT_ONCE[name]([twice, twice])
        np.testing.assert_array_equal(once, twice)


def test_a_limit_beyond_the_dtype_limits_nothing() -> None:
    grad = np.array([3.0, -4.0], np.float16)
    reference.clip_grad_value([grad], 1e9)
    assert grad.tolist() == [3, -4]


CALLS: dict[str, Callable[..., Any]] = {
    "clip_grads": lambda grads, x=0.5: reference.clip_grads(grads, x),
    "clip_grads_with_norm": lambda grads, x=0.5: reference.clip_grads_with_norm(grads, x, 5.0),
    "clip_grad_value": lambda grads, x=0.5: reference.clip_grad_value(grads, x),
    "clip_grad_norm_per_parameter": lambda grads, x=0.5: reference.clip_grad_norm_per_parameter(grads, x),
    "clip_grad_adaptive": lambda grads, x=0.5: reference.clip_grad_adaptive([np.ones(2)] * 2, grads, x),
    "clip_per_example": lambda grads, x=0.5: reference.clip_per_example(grads, x),
}
IN_PLACE = [name for name in CALLS if name != "clip_per_example"]


def grads_of_two() -> list[Any]:
    return [np.array([3.0, 4.0]), np.array([5.0, 6.0])]


NO_NUMBER = r"^`(max_norm|clip_value|clip_factor)` must be a number, got"
NO_LIST = "`grads` must be a list or a tuple of arrays, got"


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        *((value, TypeError, NO_NUMBER) for value in (None, "1", 1j, True, [1.0], np.ones(2))),
        *((value, ValueError, "must be at least 0, got") for value in (-1, -INF, math.nan, np.float32(-1))),
        (10**400, ValueError, r"^`\w+` must be within the range of float64, got a larger int"),
    ],
)
def test_wrong_thresholds(name: str, value: Any, error: type[Exception], message: str) -> None:
    grads = grads_of_two()
    with pytest.raises(error, match=message):
        CALLS[name](grads, value)
    assert grads[0].tolist() == [3, 4]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda first, _: [first, np.array([5, 6])], "must be of a .* dtype, item 1 is int64; convert it"),
        (lambda first, _: [first, [5.0, 6.0]], "`grads` must hold NumPy arrays, item 1 is list"),
        (lambda *grads: iter(grads), NO_LIST),
        (lambda *grads: dict(enumerate(grads)), NO_LIST),
        (lambda *grads: np.array(grads), NO_LIST),
    ],
)
def test_wrong_gradients(name: str, change: Callable[..., Any], message: str) -> None:
    grads = grads_of_two()
    with pytest.raises(TypeError, match=message):
        CALLS[name](change(*grads))
    assert grads[0].tolist() == [3, 4]


@pytest.mark.parametrize("name", IN_PLACE)
def test_arrays_that_cannot_be_written(name: str) -> None:
    grads = grads_of_two()
    grads[1].flags.writeable = False
    with pytest.raises(
        ValueError,
        match="`grads` must be writeable, as clipping works in place, but item 1 is not; pass a copy",
    ):
        CALLS[name](grads)
    assert grads[0].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("orders", "error"), [((None, [2], 1j, True), TypeError), (("2", "fro", math.nan), ValueError)]
)
def test_wrong_orders(orders: tuple[Any, ...], error: type[Exception]) -> None:
    for order in orders:
        with pytest.raises(error, match="`norm_type`"):
            reference.global_norm([np.ones(2)], order)


def test_a_norm_that_is_no_number_or_negative() -> None:
    grads = [np.array([3.0, 4.0])]
    nothing: Any = None
    with pytest.raises(TypeError, match="`total_norm` must be a number, got None"):
        reference.clip_grads_with_norm(grads, 1.0, nothing)
    with pytest.raises(ValueError, match="`total_norm` must be at least 0, got -1"):
        reference.clip_grads_with_norm(grads, 1.0, -1.0)
    assert grads[0].tolist() == [3, 4]


def test_complex_numbers_have_no_order() -> None:
    with pytest.raises(TypeError, match="`grads` must be of a real floating dtype, item 0 is complex128"):
        reference.clip_grad_value([np.array([1j])], 1.0)


def test_weights_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"a gradient of shape \(2,\) does not fit its weight of \(3,\)"):
        reference.clip_grad_adaptive([np.ones(3)], [np.ones(2)])


@pytest.mark.parametrize("grads", [[np.ones((2, 3)), np.ones((3, 3))], [np.ones(())]])
def test_numbers_of_examples_that_differ(grads: list[Array]) -> None:
    with pytest.raises(ValueError, match="same number of examples along its first axis, got shapes"):
        reference.clip_per_example(grads, 1.0)


def test_no_gradients() -> None:
    assert reference.clip_grads([], 1.0) == 0
    assert reference.clip_per_example([], 1.0) == ([], 0)
    assert reference.clip_grad_norm_per_parameter([], 1.0) == []
