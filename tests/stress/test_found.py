"""Cases that ``stress.py`` has found."""

import math
import warnings

import numpy as np
import pytest
import torch
from helpers import last_of, with_gradients
from torch import nn

import torchclip
from torchclip import Clipper, reference
from torchclip.clipper import Scope

on_and_off = pytest.mark.usefixtures("kernel_on_and_off")


@on_and_off
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_coefficients_below_the_range_of_float32(dtype: torch.dtype) -> None:
    for clip in (torchclip.clip_grad_norm_, torchclip.clip_grad_adaptive_):
        parameters = with_gradients([torch.full((4,), 1e30).to(dtype)])
        clip(parameters, 1e-30) if clip is torchclip.clip_grad_norm_ else clip(parameters, 1e-30, 1.0)
        torch.testing.assert_close(
            parameters[0].grad.abs().double(), torch.full((4,), 5e-31).double(), rtol=4e-3, atol=0
        )


@on_and_off
@pytest.mark.filterwarnings("ignore:Sparse ")
def test_complex_compressed_gradients() -> None:
    gradient = torch.tensor([[3 + 0j, 0], [0, 4j]]).to_sparse_csr()
    parameter = nn.Parameter(gradient.clone())
    parameter.grad = gradient
    assert torchclip.clip_grad_norm_(parameter, 1.0) == 5
    torch.testing.assert_close(gradient.values(), torch.tensor([0.6 + 0j, 0.8j]))


@on_and_off
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_fused_steps_write_nothing_between_the_elements_of_a_gradient(name: str) -> None:
    memory = torch.full((100, 1000), 7.0)
    parameter = nn.Parameter(torch.zeros(100, 500))
    parameter.grad = memory[:, ::2]
    optimizer = getattr(torch.optim, name)([parameter], lr=0.1, fused=True)
    Clipper(optimizer, 1.0)
    optimizer.step()
    assert memory[:, 1::2].eq(7).all()
    assert float(torchclip.get_total_norm(parameter.grad)) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("scope", ["global", "group", "parameter"])
def test_an_empty_gradient_has_no_part_in_a_norm_of_negative_order(scope: Scope) -> None:
    groups = [
        {"params": with_gradients([gradient])} for gradient in (torch.tensor([2.0, 3.0]), torch.zeros(0))
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    clipper = Clipper(optimizer, 1.0, norm_type=-math.inf, scope=scope)
    optimizer.step()
    assert last_of(clipper).total_norm == 2


def test_the_twins_do_not_stumble_over_inf() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sums, clipped = reference.clip_per_example([np.array([[math.inf, 1.0], [3.0, 4.0]])], 1.0)
        assert np.isnan(sums[0][0])
        assert clipped == 2
        gradient = np.zeros(2)
        reference.clip_grad_adaptive([np.array([math.inf, 1.0])], [gradient], clip_factor=0.0)
        assert np.isnan(gradient).all()
