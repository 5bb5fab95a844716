"""Symbolic numbers, fake tensors, both ends of float64, and gradients in place of parameters."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functions import CHANGING, CLIPPERS
from helpers import as_numpy, with_gradients
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode

import torchclip
from torchclip import reference
from torchclip._core import gather
from torchclip._core.scalars import ABSENT

changing = pytest.mark.parametrize("name", CHANGING)


# Traced numbers

COMPILED: dict[str, Callable[[list[Tensor], float], object]] = {
    "clip_grad_norm_": lambda ps, number: torchclip.clip_grad_norm_(ps, number),
    "norm_type": lambda ps, number: torchclip.clip_grad_norm_(ps, 0.5, number + 1),
    "clip_grads_with_norm_": lambda ps, number: torchclip.clip_grads_with_norm_(ps, number, 9 * number),
    "clip_grad_value_": lambda ps, number: torchclip.clip_grad_value_(ps, number),
    "clip_grad_norm_per_parameter_": lambda ps, number: torchclip.clip_grad_norm_per_parameter_(ps, number),
    "clip_grad_rms_": lambda ps, number: torchclip.clip_grad_rms_(ps, number),
    "clip_grad_adaptive_": lambda ps, number: torchclip.clip_grad_adaptive_(ps, number),
}


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("name", COMPILED)
def test_a_graph_holds_for_other_numbers(name: str, dynamic: bool | None) -> None:
    def clip(weight: Tensor, number: float) -> None:
        COMPILED[name]([weight], number)

    torch._dynamo.reset()
    compiled = torch.compile(clip, backend="eager", fullgraph=True, dynamic=dynamic)
    for number in (0.5, 0.75, 1.5):
        ours, expected = with_gradients([torch.full((3, 4), 2.0)] * 2, [torch.ones(3, 4)] * 2)
        ours.grad = ours.grad.clone()
        compiled(ours, number)
        clip(expected, number)
        torch.testing.assert_close(ours.grad, expected.grad)


# Fake tensors outside of their mode


@pytest.mark.usefixtures("kernel_on_and_off")
@pytest.mark.parametrize("name", CLIPPERS)
def test_fake_tensors_outside_their_mode_give_fake_tensors(name: str) -> None:
    with FakeTensorMode():
        parameters = with_gradients([torch.ones(4, 3), torch.ones(5, dtype=torch.float16)])
    result = CLIPPERS[name].ours(parameters, 0.5, 2)
    assert result is None or isinstance(result, FakeTensor)
    sums, clipped = torchclip.clip_per_example([parameters[0].grad], 1.0)
    assert isinstance(sums[0], FakeTensor)
    assert isinstance(clipped, FakeTensor)


# The ends of float64

LARGE = 1.7e308


@pytest.mark.usefixtures("kernel_on_and_off")
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


@pytest.mark.usefixtures("kernel_on_and_off")
def test_a_limit_for_the_norm_may_exceed_float64() -> None:
    gradient = torch.zeros(100, dtype=torch.float64)
    gradient[0] = LARGE  # of a root mean square of a tenth
    (parameter,) = with_gradients([gradient.clone()])
    found = torchclip.clip_grad_rms_(parameter, 1e308)
    assert found.tolist() == pytest.approx([LARGE / 10])
    assert torch.equal(parameter.grad, gradient)


@pytest.mark.usefixtures("kernel_on_and_off")
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


@pytest.mark.usefixtures("kernel_on_and_off")
@pytest.mark.parametrize("order", [0.5, 1.0, 2.0, 3.0, math.inf])
def test_complex_numbers_of_few_digits(order: float) -> None:
    least = 5e-324
    values = torch.complex(*torch.tensor([[3 * least] * 50, [2 * least] * 50], dtype=torch.float64))
    exact = math.sqrt(13) * (1.0 if math.isinf(order) else 50 ** (1 / order))
    norm = torchclip.get_total_norm([values], order)
    twin = reference.global_norm([as_numpy(values)], order)
    assert abs(norm.item() / least - exact) <= 0.5 + 1e-12 * exact
    assert abs(twin / least - exact) <= 0.5 + 1e-12 * exact


@pytest.mark.usefixtures("kernel_on_and_off")
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_finite_elements_beside_an_empty_gradient(order: float) -> None:
    batch = gather.tensors([torch.zeros(0), torch.tensor([3.0, math.nan])])
    assert batch.norms(order, True) == [ABSENT, 3.0]


# Sparse gradients of inference mode


@pytest.mark.usefixtures("kernel_on_and_off")
@changing
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_entries_for_one_place_that_were_made_in_inference_mode(name: str) -> None:
    def parameter(inference: bool) -> Any:
        with torch.inference_mode(inference):
            entries = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
            gradient = torch.sparse_coo_tensor(torch.tensor([[0, 0, 1]]), entries, (3, 2))
        weight = nn.Parameter(torch.ones(3, 2))
        weight.grad = gradient
        return weight

    ours, expected = parameter(True), parameter(False)
    for each in (ours, expected):
        CHANGING[name].ours([each], 0.5, 2)
    torch.testing.assert_close(ours.grad.to_dense(), expected.grad.to_dense(), rtol=0, atol=0)


# Gradients in place of parameters


@pytest.mark.usefixtures("kernel_on_and_off")
@changing
def test_gradients_in_place_of_parameters_give_a_warning(name: str) -> None:
    gradients = [torch.full((2,), 9.0), torch.full((3,), 9.0)]
    with pytest.warns(UserWarning, match="Pass the parameters themselves, not their gradients") as caught:
        CHANGING[name](gradients)
    assert [warning.filename for warning in caught] == [CHANGING[name].__call__.__code__.co_filename]
    assert all(gradient.eq(9).all() for gradient in gradients)


@pytest.mark.usefixtures("kernel_on_and_off")
@changing
def test_a_model_that_has_no_gradients_gives_none(name: str) -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with_gradient = torch.ones(2)
    with_gradient.grad = torch.ones(2)
    passed: list[Any] = [frozen, frozen.parameters(), nn.Linear(2, 2), nn.Identity(), []]
    passed.append(torch.ones(2, requires_grad=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for parameters in [*passed, [with_gradient, torch.ones(2)]]:
            CHANGING[name](parameters)
