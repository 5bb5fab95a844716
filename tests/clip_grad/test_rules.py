"""Clipping by root mean square, and the rules that a Clipper takes in place of ``max_norm``."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import grad_of, random_gradients, with_gradients

import torchclip
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


def test_a_gradient_as_long_as_the_limit_is_not_touched() -> None:
    gradient = torch.full((7,), 0.3)
    limit = torchclip.clip_grad_rms_(with_gradients([gradient.double()]), math.inf).item()
    double = gradient.double()
    torchclip.clip_grad_rms_(with_gradients([double]), limit)
    assert torch.equal(double, gradient.double())


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
