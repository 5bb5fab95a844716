"""The kernel looks at its tensors' memory anew in each call, whatever happened to them in between.

Also run under the sanitizers, as test_kernel.py says: there, reading freed memory is an error.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import with_gradients
from torch import Tensor

from torchclip import kernel

_kernel = pytest.importorskip("torchclip._kernel")
if kernel.status().startswith("off"):
    pytest.skip(f"the kernel is {kernel.status()}", allow_module_level=True)

LARGE = 100_000  # several chunks; its memory goes back to the system when it is freed


def replaced(tensor: Tensor) -> None:
    tensor.data = torch.full((7,), 2.0)


def replaced_by_another_dtype(tensor: Tensor) -> None:
    tensor.data = torch.full((7,), 2.0, dtype=torch.bfloat16)


def replaced_by_other_strides(tensor: Tensor) -> None:
    tensor.data = torch.full((4, 3), 2.0).t()


def shrunk(tensor: Tensor) -> None:
    tensor.resize_(5).fill_(2.0)


def grown(tensor: Tensor) -> None:
    tensor.resize_(3 * LARGE).fill_(2.0)


def emptied(tensor: Tensor) -> None:
    tensor.resize_(0)


def set_to_other_memory(tensor: Tensor) -> None:
    new: Any = torch.full((2, 9), 2.0)
    tensor.set_(new)


def without_memory(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(0)
    set_to_other_memory(tensor)


def filled(tensor: Tensor) -> None:
    tensor.fill_(2.0)


CHANGES = [
    replaced,
    replaced_by_another_dtype,
    replaced_by_other_strides,
    shrunk,
    grown,
    emptied,
    set_to_other_memory,
    without_memory,
    filled,
]
UNUSABLE = {
    "of integers": lambda: torch.ones(LARGE, dtype=torch.int32),
    "overlapping": lambda: torch.ones(9).as_strided((3, 3), (1, 1)),
    "expanded": lambda: torch.ones(1).expand(LARGE),
}
METHODS: dict[str, Callable[[Any], Any]] = {
    "norm": lambda batch: batch.norm(2.0),
    "norm of the finite": lambda batch: batch.norm(2.0, True),
    "norms": lambda batch: batch.norms(1.0),
    "scale_": lambda batch: batch.scale_(0.5),
    "scale_each_": lambda batch: batch.scale_each_([0.5, 0.25]),
    "clamp_": lambda batch: batch.clamp_(0.5),
    "zero_nonfinite_": lambda batch: batch.zero_nonfinite_(),
}


class Number:
    """A number that runs some code when its value is read."""

    def __init__(self, value: float, code: Callable[[], object]) -> None:
        self.value, self.code = value, code

    def __float__(self) -> float:
        self.code()
        return self.value


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_there_now_is_measured_and_written(change: Callable[[Tensor], None]) -> None:
    gradient, other = torch.ones(LARGE), torch.tensor([3.0, 4.0])
    batch = _kernel.gradients(with_gradients([gradient, other]))
    assert batch.norm(2.0) == pytest.approx(math.sqrt(LARGE + 25))
    change(gradient)
    gc.collect()
    count = gradient.numel()
    assert batch.norm(2.0) == pytest.approx(math.sqrt(4 * count + 25))
    assert batch.norms(1.0, True) == [2.0 * count if count else -1.0, 7.0]
    batch.scale_(0.5)
    batch.scale_each_([3.0, 1.0])
    assert gradient.double().eq(3.0).all()
    assert other.tolist() == [1.5, 2.0]
    batch.clamp_(1.75)
    assert gradient.double().eq(1.75).all()
    assert other.tolist() == [1.5, 1.75]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("made", UNUSABLE)
def test_what_cannot_be_taken_any_more_is_refused_before_anything_is_written(made: str, method: str) -> None:
    first, gradient = torch.tensor([3.0, math.inf]), torch.ones(LARGE)
    batch = _kernel.tensors([first, gradient])
    gradient.data = UNUSABLE[made]()
    with pytest.raises(RuntimeError, match="gradient 1 changed during the call"):
        METHODS[method](batch)
    assert first.tolist() == [3.0, math.inf]
    assert gradient.double().eq(1.0).all()


def test_a_tensor_that_became_complex_is_not_clamped() -> None:
    gradient = torch.ones(3)
    batch = _kernel.tensors([torch.ones(2), gradient])
    gradient.data = torch.ones(3, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="gradient 1 changed"):
        batch.clamp_(0.5)
    assert batch.all[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("change", CHANGES)
def test_code_that_runs_in_the_middle_of_a_call(change: Callable[[Tensor], None]) -> None:
    gradient = torch.ones(LARGE)
    batch = _kernel.tensors([gradient])
    norm = batch.norm(Number(2.0, lambda: change(gradient)))
    count = gradient.numel()
    assert norm == pytest.approx(2 * math.sqrt(count)) if count else norm == -1.0
    number = Number(0.25, lambda: change(gradient))
    for method, argument in ((batch.scale_, number), (batch.scale_each_, [number]), (batch.clamp_, number)):
        method(argument)
        assert gradient.double().le(0.5).all()


def test_only_references_are_kept() -> None:
    gradient = torch.ones(LARGE)
    batch = _kernel.tensors([gradient])
    number = id(gradient)
    del gradient
    gc.collect()
    assert [id(tensor) for tensor in batch.all] == [number]
    assert batch.norm(math.inf) == 1.0


def test_a_list_of_all_that_somebody_changed_harms_nobody() -> None:
    batch = _kernel.tensors([torch.ones(3), torch.ones(1)])
    batch.all.clear()
    gc.collect()
    assert batch.norm(2.0) == 2.0
    batch.scale_(0.5)
    assert batch.norm(2.0) == 1.0
