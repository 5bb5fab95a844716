"""Properties that hold for all gradients, checked on those that hypothesis draws."""

import math
from collections.abc import Sequence
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from functions import CLIPPERS
from helpers import as_numpy, assert_same_up_to_rounding, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchclip
from torchclip import get_total_norm, reference

pytestmark = pytest.mark.usefixtures("kernel_on_and_off")
fewer_examples = settings(max_examples=40)

REAL = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}
COMPLEX = {torch.complex64: np.complex64, torch.complex128: np.complex128}
shapes = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6)
limits = st.one_of(st.sampled_from([0.0, 1.0, math.inf]), st.floats(1e-6, 1e6))
orders = st.sampled_from([0, 0.5, 1, 2, 3, -1, math.inf, -math.inf])


@st.composite
def gradients(
    draw: st.DrawFn,
    dtypes: Sequence[torch.dtype] = (*REAL, torch.bfloat16, *COMPLEX),
    magnitude: float | None = None,
) -> list[Tensor]:
    """Several gradients of several dtypes and shapes, of all magnitudes, in any order of their axes."""
    tensors = []
    for dtype in draw(st.lists(st.sampled_from(dtypes), max_size=4)):
        kind = {**REAL, **COMPLEX}.get(dtype, np.float32)
        top = float(np.finfo(kind).max) / 8 if magnitude is None else magnitude
        width: Any = 8 * np.finfo(kind).dtype.itemsize
        # A limit has to be a number of the dtype.
        top = float(np.finfo(kind).dtype.type(top))
        if dtype in COMPLEX:
            elements = st.complex_numbers(max_magnitude=top, width=2 * width)
        else:
            elements = st.floats(-top, top, width=width)
        array = draw(arrays.arrays(kind, draw(shapes), elements=elements))
        tensor = torch.from_numpy(array.copy()).to(dtype)
        tensors.append(tensor.permute(draw(st.permutations(range(tensor.dim())))))
    return tensors


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


@pytest.mark.parametrize("name", CLIPPERS)
@given(tensors=gradients(magnitude=1e4), limit=limits, order=orders)
@fewer_examples
def test_a_function_is_its_numpy_twin(name: str, tensors: list[Tensor], limit: float, order: float) -> None:
    if name == "clip_grad_value_":
        tensors = [t for t in tensors if not t.is_complex()]
    weights = [t.flip(0) if t.dim() else t + 1 for t in tensors]
    parameters = with_gradients(copies(tensors), copies(weights))
    twins = [as_numpy(t) for t in tensors]
    result = CLIPPERS[name].ours(parameters, limit, order)
    expected = CLIPPERS[name].twin([as_numpy(w) for w in weights], twins, limit, order)
    if expected is not None:
        expected = np.asarray(expected)
        with np.errstate(over="ignore"):
            np.testing.assert_allclose(
                result.double().numpy(),
                expected.astype(as_numpy(result).dtype).astype(np.float64),
                rtol=1e-12 if result.dtype == torch.float64 else 1.2e-7,
                atol=1e-45,
            )
    for parameter, twin in zip(parameters, twins, strict=True):
        assert_same_up_to_rounding(parameter.grad, twin)


@given(tensors=gradients(), order=orders)
@fewer_examples
def test_the_norm_of_any_magnitudes_is_that_of_numpy(tensors: list[Tensor], order: float) -> None:
    total_norm = get_total_norm(tensors, order)
    expected = reference.global_norm([as_numpy(t) for t in tensors], order)
    if total_norm.dtype == torch.float32 and expected > torch.finfo(torch.float32).max:
        assert total_norm == math.inf
    else:
        smallest = 5e-324 if total_norm.dtype == torch.float64 else 1e-45
        np.testing.assert_allclose(float(total_norm), expected, rtol=1.2e-7, atol=smallest)


@given(tensors=gradients(magnitude=1e4), limit=st.floats(1e-3, 1e4))
@fewer_examples
def test_after_clipping_the_norm_is_at_most_max_norm_and_clipping_again_changes_little(
    tensors: list[Tensor], limit: float
) -> None:
    parameters = with_gradients(copies(tensors))
    before = float(torchclip.clip_grad_norm_(parameters, limit))
    after = float(get_total_norm([p.grad for p in parameters]))
    # Each number is rounded to its own dtype: half a unit of bfloat16, or of its smallest number.
    assert after <= min(before, limit) * (1 + 2**-8) + 1e-5
    if before * (1 + 1e-7) + 1e-6 <= limit:
        assert all(torch.equal(p.grad, t) for p, t in zip(parameters, tensors, strict=True))


@given(tensors=gradients((*REAL, torch.bfloat16)), limit=st.floats(0, 1e6))
@fewer_examples
def test_by_value_every_element_ends_within_the_limit_and_others_stay(
    tensors: list[Tensor], limit: float
) -> None:
    parameters = with_gradients(copies(tensors))
    torchclip.clip_grad_value_(parameters, limit)
    for parameter, tensor in zip(parameters, tensors, strict=True):
        rounded = torch.tensor(limit, dtype=torch.float64).to(tensor.dtype)
        assert bool((parameter.grad.abs() <= rounded).all())
        inside = tensor.abs() <= rounded
        assert torch.equal(parameter.grad[inside], tensor[inside])
        assert torch.equal(parameter.grad.sign(), tensor.sign() if rounded > 0 else torch.zeros_like(tensor))
