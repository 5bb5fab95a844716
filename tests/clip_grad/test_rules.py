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
every_rule = pytest.mark.parametrize("name", RULES)
SHAPES = [(3, 4), (5,), (), (2, 3, 2), (0,)]


def test_a_gradient_as_long_as_the_limit_is_not_touched() -> None:
    gradient = torch.full((7,), 0.3)
    limit = torchclip.clip_grad_rms_(with_gradients([gradient.double()]), math.inf).item()
    double = gradient.double()
    torchclip.clip_grad_rms_(with_gradients([double]), limit)
    assert torch.equal(double, gradient.double())


# The ends of float64

LARGE = 1.7e308


def test_a_root_mean_square_fits_where_the_norm_does_not() -> None:
    values = torch.full((100,), LARGE, dtype=torch.float64)
    parameters = with_gradients([values.clone(), torch.ones(4, dtype=torch.float64)])
    twins = [as_numpy(p.grad) for p in parameters]
    found = torchclip.clip_grad_rms_(parameters, 1e308)
    assert found.tolist() == pytest.approx([LARGE, 1.0], rel=1e-14)
    assert found.tolist() == pytest.approx(reference.clip_grad_rms(twins, 1e308), rel=1e-14)
    for parameter, twin, expected in zip(parameters, twins, (1e308, 1.0), strict=True):
        assert parameter.grad.tolist() == pytest.approx([expected] * parameter.numel(), rel=1e-14)
        assert twin.tolist() == pytest.approx([expected] * parameter.numel(), rel=1e-14)


def test_a_limit_for_the_norm_may_exceed_float64() -> None:
    gradient = torch.zeros(100, dtype=torch.float64)
    gradient[0] = LARGE  # of a root mean square of a tenth
    (parameter,) = with_gradients([gradient.clone()])
    found = torchclip.clip_grad_rms_(parameter, 1e308)
    assert found.tolist() == pytest.approx([LARGE / 10])
    assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("clip_factor", [0.5, 10.0])
def test_ratios_of_norms_that_exceed_float64(clip_factor: float) -> None:
    weights = torch.full((3, 100), LARGE, dtype=torch.float64)
    gradients = weights.clone()
    weights[1], gradients[2] = 1.0, 1e-300
    (parameter,) = with_gradients([gradients.clone()], [weights])
    twin = as_numpy(gradients)
    torchclip.clip_grad_adaptive_(parameter, clip_factor)
    reference.clip_grad_adaptive([as_numpy(weights)], [twin], clip_factor)
    expected = [min(clip_factor, 1.0) * LARGE, clip_factor, 1e-300]
    assert parameter.grad[:, 0].tolist() == pytest.approx(expected, rel=1e-13)
    assert twin[:, 0].tolist() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex128])
def test_an_infinite_gradient_becomes_nan_and_the_rest_of_its_unit_zero(dtype: torch.dtype) -> None:
    gradients = torch.ones(2, 3, dtype=dtype)
    infinite: Any = complex(1, math.inf) if dtype.is_complex else math.inf
    gradients[0, 1] = infinite
    (parameter,) = with_gradients([gradients.clone()], [torch.ones_like(gradients)])
    twin = as_numpy(gradients)
    torchclip.clip_grad_adaptive_(parameter, 2.0)
    reference.clip_grad_adaptive([np.ones_like(twin)], [twin], 2.0)
    undefined: Any = complex(0, math.nan) if dtype.is_complex else math.nan
    parts = gradients.clone()
    parts[0] = 0
    parts[0, 1] = undefined
    torch.testing.assert_close(parameter.grad, parts, rtol=0, atol=0, equal_nan=True)
    np.testing.assert_array_equal(twin, as_numpy(parts))


# --- rules for a Clipper ------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("scale", [None, 1.0, 0.25, 65536.0])
def test_a_rule_does_what_its_function_does_without_the_grad_scale(name: str, scale: float | None) -> None:
    rule, function = RULES[name]
    grads, values = (random_gradients(SHAPES, torch.float64, scale=each) for each in (1.0, 0.5))
    factor = 1.0 if scale is None else scale
    ours, theirs = with_gradients([factor * g for g in grads], values), with_gradients(grads, values)
    rule.clip_(ours, None if scale is None else torch.tensor(scale))
    function(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(grad_of(mine), factor * grad_of(other), rtol=1e-12, atol=0)
