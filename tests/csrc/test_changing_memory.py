"""The kernel looks at its tensors' memory anew in each call, whatever happened to them in between.

Also run under the sanitizers, as CONTRIBUTING.md says: there, reading freed memory is an error.
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


# What may happen to a gradient; its elements are 2 afterwards.
CHANGES: dict[str, Callable[[Any], object]] = {
    "replaced": lambda t: setattr(t, "data", torch.full((7,), 2.0)),
    "replaced by another dtype": lambda t: setattr(t, "data", torch.full((7,), 2.0, dtype=torch.bfloat16)),
    "replaced by other strides": lambda t: setattr(t, "data", torch.full((4, 3), 2.0).t()),
    "shrunk": lambda t: t.resize_(5).fill_(2.0),
    "grown": lambda t: t.resize_(3 * LARGE).fill_(2.0),
    "emptied": lambda t: t.resize_(0),
    "set to other memory": lambda t: t.set_(torch.full((2, 9), 2.0)),
    "without memory in between": lambda t: (t.untyped_storage().resize_(0), t.set_(torch.full((9,), 2.0))),
    "filled": lambda t: t.fill_(2.0),
}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
UNUSABLE = {
    "of integers": lambda: torch.ones(LARGE, dtype=torch.int32),
    "overlapping": lambda: torch.ones(9).as_strided((3, 3), (1, 1)),
    "expanded": lambda: torch.ones(1).expand(LARGE),
}
METHODS: dict[str, Callable[[Any], Any]] = {
    "norm": lambda batch: batch.norm(2.0),
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


@changes
def test_what_is_there_now_is_measured_and_written(change: Callable[[Tensor], object]) -> None:
    gradient, other = torch.ones(LARGE), torch.tensor([3.0, 4.0])
    batch = _kernel.gradients(with_gradients([gradient, other]))
    assert batch.norm(2.0) == pytest.approx(math.sqrt(LARGE + 25))
    change(gradient)
    gc.collect()
    count = gradient.numel()
    assert batch.norm(2.0) == pytest.approx(math.sqrt(4 * count + 25))
    assert batch.norms(1.0) == [2.0 * count if count else -1.0, 7.0]
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


@changes
def test_code_that_runs_in_the_middle_of_a_call(change: Callable[[Tensor], object]) -> None:
    gradient = torch.ones(LARGE)
    batch = _kernel.tensors([gradient])
    norm = batch.norm(Number(2.0, lambda: change(gradient)))
    count = gradient.numel()
    assert norm == pytest.approx(2 * math.sqrt(count)) if count else norm == -1.0
    number = Number(0.25, lambda: change(gradient))
    for method, argument in ((batch.scale_, number), (batch.scale_each_, [number]), (batch.clamp_, number)):
        method(argument)
        assert gradient.double().le(0.5).all()
