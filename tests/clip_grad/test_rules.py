"""Clipping by root mean square, and the rules that a Clipper takes in place of ``max_norm``."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import as_numpy, grad_of, random_gradients, with_gradients

import torchclip
from torchclip import reference
from torchclip.thresholds.base import Rule

pytestmark = pytest.mark.usefixtures("kernel_on_and_off")

RULES: dict[str, tuple[Rule, Callable[[Any], object]]] = {
    "BlockRMS": (torchclip.BlockRMS(0.3), lambda ps: torchclip.clip_grad_rms_(ps, 0.3)),
    "Value": (torchclip.Value(0.3), lambda ps: torchclip.clip_grad_value_(ps, 0.3)),
    "Adaptive": (torchclip.Adaptive(0.2, 0.5), lambda ps: torchclip.clip_grad_adaptive_(ps, 0.2, 0.5)),
}
nothing: Any = None
every_rule = pytest.mark.parametrize("name", RULES)
SHAPES = [(3, 4), (5,), (), (2, 3, 2), (0,)]


def rms(values: np.ndarray) -> float:
    return math.sqrt(float(np.mean(np.abs(values.astype(np.float64)) ** 2)))


@pytest.mark.parametrize("max_rms", [1e-6, 0.1, 0.5, 1.0, 10.0])
def test_no_gradient_is_longer_than_max_rms_and_the_others_stay(max_rms: float) -> None:
    gradients = random_gradients([(3, 4), (5,), (2, 3, 2), (1000,)], torch.float64)
    before = [as_numpy(g) for g in gradients]
    found = torchclip.clip_grad_rms_(with_gradients(gradients), max_rms)
    np.testing.assert_allclose(found.numpy(), [rms(b) for b in before], rtol=1e-12)
    for gradient, original in zip(gradients, before, strict=True):
        if rms(original) <= max_rms:
            np.testing.assert_array_equal(as_numpy(gradient), original)
        else:
            assert rms(as_numpy(gradient)) == pytest.approx(max_rms, rel=1e-12)
            np.testing.assert_allclose(as_numpy(gradient) / max_rms, original / rms(original), rtol=1e-9)


def test_a_gradient_as_long_as_the_limit_is_not_touched() -> None:
    gradient = torch.full((7,), 0.3)
    limit = torchclip.clip_grad_rms_(with_gradients([gradient.double()]), math.inf).item()
    double = gradient.double()
    torchclip.clip_grad_rms_(with_gradients([double]), limit)
    assert torch.equal(double, gradient.double())


def test_no_elements_have_a_mean_of_0() -> None:
    assert torchclip.clip_grad_rms_(with_gradients([torch.zeros(0), torch.ones(2)]), 1.0).tolist() == [
        0.0,
        1.0,
    ]
    assert torchclip.clip_grad_rms_([], 1.0).tolist() == []


def test_the_zeros_of_a_sparse_gradient_count() -> None:
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[1]]), torch.tensor([[3.0, 4.0]]), (8, 2), check_invariants=True
    )
    assert torchclip.clip_grad_rms_(with_gradients([sparse]), 0.5).item() == pytest.approx(5 / 4)
    assert reference.clip_grad_rms([sparse.to_dense().numpy()], 1.0) == [pytest.approx(0.5)]


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_max_rms_below_0(value: float) -> None:
    gradient = torch.ones(3)
    with pytest.raises(ValueError, match="`max_rms` must be at least 0"):
        torchclip.clip_grad_rms_(with_gradients([gradient]), value)
    assert gradient.tolist() == [1, 1, 1]


def test_max_rms_is_a_number_or_a_string_of_one() -> None:
    assert torchclip.clip_grad_rms_(with_gradients([torch.ones(3)]), "1e-3").tolist() == [1.0]  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`max_rms` must be a number, got 'abc'"):
        torchclip.clip_grad_rms_([], "abc")  # type: ignore[arg-type]


# --- rules for a Clipper ------------------------------------------------------------------------------------


@every_rule
def test_a_rule_does_what_its_function_does(name: str) -> None:
    rule, function = RULES[name]
    values = random_gradients(SHAPES, torch.float32, scale=0.5)
    ours = with_gradients(random_gradients(SHAPES, torch.float32), values)
    theirs = with_gradients(random_gradients(SHAPES, torch.float32), values)
    rule.clip_(ours)
    function(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(grad_of(mine), grad_of(other))


@every_rule
@pytest.mark.parametrize("scale", [1.0, 0.25, 65536.0])
def test_a_grad_scale_is_taken_out_of_the_rule(name: str, scale: float) -> None:
    rule, _ = RULES[name]
    values = random_gradients(SHAPES, torch.float64, scale=0.5)
    scaled = with_gradients([scale * g for g in random_gradients(SHAPES, torch.float64)], values)
    plain = with_gradients(random_gradients(SHAPES, torch.float64), values)
    rule.clip_(scaled, torch.tensor(scale))
    rule.clip_(plain)
    for mine, other in zip(scaled, plain, strict=True):
        torch.testing.assert_close(grad_of(mine), scale * grad_of(other), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torchclip.BlockRMS(-1), ValueError, "`max_rms` must be at least 0, got -1"),
        (lambda: torchclip.Value(math.nan), ValueError, "`clip_value` must be at least 0, got nan"),
        (lambda: torchclip.Adaptive(nothing), TypeError, "`clip_factor` must be a number, got None"),
        (lambda: torchclip.Adaptive(eps=-1), ValueError, "`eps` must be at least 0, got -1"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@every_rule
def test_repr_is_the_call(name: str) -> None:
    rule, _ = RULES[name]
    assert repr(eval(repr(rule), vars(torchclip).copy())) == repr(rule)
