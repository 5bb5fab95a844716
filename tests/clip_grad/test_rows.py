"""Clipping row by row, tensor by tensor and example by example, with and without the kernel."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import DTYPES, as_numpy, assert_same_up_to_rounding, bits, randn, with_gradients
from torch import Tensor, nn

import torchclip
from torchclip import reference

GUARD = 7.0


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def with_gaps(tensor: Tensor) -> Tensor:
    memory = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), GUARD, dtype=tensor.dtype)
    view = memory[..., : 2 * tensor.shape[-1] : 2]
    return view.copy_(tensor)


def every_second_row(tensor: Tensor) -> Tensor:
    memory = torch.full((2 * len(tensor), *tensor.shape[1:]), GUARD, dtype=tensor.dtype)
    return memory[::2].copy_(tensor)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


LAYOUTS = [as_it_is, transposed, with_gaps, every_second_row, channels_last]

RULES: dict[str, Callable[[Any, float], Any]] = {
    "adaptive": lambda parameters, order: torchclip.clip_grad_adaptive_(parameters, 0.5, 1e-3, order),
    "per parameter": lambda p, order: torchclip.clip_grad_norm_per_parameter_(p, 3.0, order),
    "RMS": lambda parameters, _: torchclip.clip_grad_rms_(parameters, 0.9),
}


@pytest.mark.usefixtures("kernel_on_and_off")
class TestMemoryThatIsShared:
    def test_gradients_that_overlap_are_measured_before_any_is_changed(self) -> None:
        for name, rule in RULES.items():
            memory = torch.arange(1.0, 31.0)
            expected = memory.clone()
            views = [memory[:20].view(4, 5), memory[10:].view(4, 5)]
            copies = [expected[:20].clone().view(4, 5), expected[10:].clone().view(4, 5)]
            apart = with_gradients(copies, [torch.ones(4, 5)] * 2)
            rule(apart, 2.0)
            # Each overlapping element is multiplied by both numbers.
            rule(with_gradients(views, [torch.ones(4, 5)] * 2), 2.0)
            first = apart[0].grad.view(-1)[10:] / expected[10:20]
            second = apart[1].grad.view(-1)[:10] / expected[10:20]
            torch.testing.assert_close(memory[10:20], expected[10:20] * first * second, msg=name)
            torch.testing.assert_close(memory[:10], apart[0].grad.view(-1)[:10], msg=name)

    def test_a_gradient_in_the_memory_of_the_weights(self) -> None:
        weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        weight.grad = weight.detach()
        torchclip.clip_grad_adaptive_(weight, 0.5)
        torch.testing.assert_close(weight.detach(), torch.tensor([[1.5, 2.0], [0.15, 0.2]]))


@pytest.mark.usefixtures("kernel_on_and_off")
@pytest.mark.parametrize("is_sparse", [False, True])
def test_only_what_is_changed_has_a_new_version(is_sparse: bool) -> None:
    small, large = with_gradients([torch.full((2, 2), 1e-6), torch.ones(2, 2)], [torch.ones(2, 2)] * 2)
    if is_sparse:
        small.grad = small.grad.to_sparse(1)
    for rule in RULES.values():
        before = bits(small.grad.to_dense())
        versions = small.grad._version, large.grad._version
        large.grad.fill_(9.0)
        rule([small, large], 2.0)
        assert bits(small.grad.to_dense()) == before
        assert small.grad._version == versions[0]
        assert large.grad._version > versions[1] + 1


EXAMPLES = 9


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_examples_equal_the_numpy_twin(dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    shapes: Sequence[tuple[int, ...]] = [
        (EXAMPLES,),
        (EXAMPLES, 5, 3, 3),
        (EXAMPLES, 2, 3000),
        (EXAMPLES, 40),
        (EXAMPLES, 0),
    ]
    # All positive, so that no digits cancel out.
    grads = [layout(randn(*shape, dtype=dtype, seed=i).abs().to(dtype)) for i, shape in enumerate(shapes)]
    before = [bits(grad) for grad in grads]
    norms = torch.stack([grad[..., None].flatten(1).abs().double().norm(dim=1) for grad in grads]).norm(dim=0)
    middle = float(norms.sort().values[3:5].mean())
    for limit, above in ((middle, 5), (0.0, EXAMPLES), (math.inf, 0)):
        sums, clipped = torchclip.clip_per_example(grads, limit)
        expected, number = reference.clip_per_example([as_numpy(grad) for grad in grads], limit)
        assert clipped == number == above
        assert clipped.dtype is torch.int64
        for ours, twin in zip(sums, expected, strict=True):
            assert ours.dtype is dtype
            assert ours.is_contiguous()
            assert_same_up_to_rounding(ours, twin)
        assert [bits(grad) for grad in grads] == before


@pytest.mark.usefixtures("everywhere")
def test_no_examples_and_no_elements() -> None:
    sums, clipped = torchclip.clip_per_example([torch.ones(0, 3), torch.ones(0)], 1.0)
    assert [each.tolist() for each in sums] == [[0.0] * 3, 0.0]
    assert clipped == 0
    sums, clipped = torchclip.clip_per_example([torch.ones(2, 0), torch.full((2,), 3.0)], 1.0)
    assert sums[0].shape == (0,)
    assert clipped == 2


@pytest.mark.usefixtures("kernel_on_and_off")
def test_examples_that_stand_for_conjugates() -> None:
    grads = randn(4, 3, dtype=torch.complex64)
    for lazy, expected in ((grads.conj(), grads.conj().resolve_conj()), (grads.conj().imag, -grads.imag)):
        sums, _ = torchclip.clip_per_example([lazy], math.inf)
        torch.testing.assert_close(sums[0], expected.sum(0))
