"""``Percentile`` for many parameters in host memory: what the kernel keeps gives the float form's answers."""

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchclip import Percentile, kernel
from torchclip._core import native
from torchclip._core.scalars import ABSENT
from torchclip.thresholds.base import MaxNormRule
from torchclip.thresholds.each import Each

if kernel.status().startswith("off"):
    pytest.skip(f"the kernel is {kernel.status()}", allow_module_level=True)

STEPS = 150  # more than there is room for at first
PERCENTILES = [0.0, 10.0, 33.3, 50.0, 99.9, 100.0]
WINDOWS = [None, 1, 2, 9, 64, 100]
every_window = pytest.mark.parametrize("window", WINDOWS)


def random_norms(rows: int) -> NDArray[np.float64]:
    """Steps of norms of which many are equal, some are not finite, and some are not there."""
    rng = np.random.default_rng(rows)
    norms = rng.choice(rng.lognormal(size=50) * 10.0 ** rng.integers(-9, 9, size=50), size=(STEPS, rows))
    unusual = rng.random(norms.shape) < 0.1
    norms[unusual] = rng.choice([0.0, 5e-324, 1.7e308, math.inf, math.nan, ABSENT], size=unusual.sum())
    return norms


def each_of(thresholds: Sequence[Percentile]) -> Each:
    each = thresholds[0].each([threshold.state_dict() for threshold in thresholds], torch.device("cpu"))
    assert each is not None
    return each


def assert_learn_alike(each: Each, thresholds: Sequence[Percentile], steps: NDArray[np.float64]) -> None:
    """That both forms give the same answers to the last digit; where there is no gradient, none counts."""
    for norms in steps:
        answers = each.update(torch.from_numpy(norms), 2.0).tolist()
        for threshold, norm, answer in zip(thresholds, norms.tolist(), answers, strict=True):
            assert norm == ABSENT or threshold.update(norm) == answer
    assert each.states() == [threshold.state_dict() for threshold in thresholds]


@every_window
@pytest.mark.parametrize("percentile", PERCENTILES)
def test_answers_are_those_of_the_float_form(percentile: float, window: int | None) -> None:
    thresholds = [Percentile(percentile, window=window, warmup=2, max_norm=1e300) for _ in range(5)]
    assert_learn_alike(each_of(thresholds), thresholds, random_norms(5))


@every_window
@pytest.mark.parametrize("stop", [0, 1, 64, 120])
def test_a_resumed_run_goes_on_with_the_same_digits(stop: int, window: int | None) -> None:
    thresholds = [Percentile(40.0, window=window) for _ in range(3)]
    first, steps = each_of(thresholds), random_norms(3)
    assert_learn_alike(first, thresholds, steps[:stop])
    resumed = [Percentile(40.0, window=window) for _ in range(3)]
    for threshold, state in zip(resumed, first.states(), strict=True):
        threshold.load_state_dict(json.loads(json.dumps(state, allow_nan=False)))
    assert_learn_alike(each_of(resumed), thresholds, steps[stop:])


@every_window
@pytest.mark.parametrize("before", [(3, 100), (100, 3), (0, 130)])
def test_rows_with_more_or_fewer_norms_can_be_added(before: tuple[int, int], window: int | None) -> None:
    steps = random_norms(4)
    parts = []
    for rows, seen in zip((slice(0, 1), slice(1, 4)), before, strict=True):
        thresholds = [Percentile(70.0, window=window) for _ in range(4)[rows]]
        part = each_of(thresholds)
        assert_learn_alike(part, thresholds, steps[:seen, rows])
        parts.append((part, thresholds))
    (each, thresholds), (more, further) = parts
    each.append(more)
    assert_learn_alike(each, [*thresholds, *further], steps)


@pytest.mark.parametrize("window", [None, 20])
def test_the_kernel_can_be_turned_off_and_on_again_meanwhile(window: int | None) -> None:
    rule, names = MaxNormRule(Percentile(25.0, window=window)), [f"parameter {i}" for i in range(20)]
    thresholds = [Percentile(25.0, window=window) for _ in names]
    for step, norms in enumerate(np.abs(random_norms(20)[:60])):
        with kernel.disabled() if step // 10 % 2 else nullcontext():
            answers = rule.max_norms(step, names, norms.tolist())
        assert isinstance(answers, Tensor) != (step // 10 % 2)
        pairs = zip(thresholds, norms.tolist(), strict=True)
        assert list(map(float, answers)) == [threshold.update(norm) for threshold, norm in pairs]
    assert [*rule.state_dict().values()] == [threshold.state_dict() for threshold in thresholds]


def columns(rows: int, capacity: int) -> list[Tensor]:
    double, whole = torch.float64, torch.int64
    heaps = [torch.zeros(rows, capacity, dtype=dtype) for dtype in (double, torch.int32, torch.int32)]
    return [*(torch.zeros(rows, dtype=dtype) for dtype in (double, double, whole)), *heaps]


@pytest.mark.parametrize(
    ("changed", "column"),
    [
        (0, torch.zeros(3)),
        (0, torch.zeros(6, dtype=torch.float64)[::2]),
        (0, torch.zeros(3, dtype=torch.float64, device="meta")),
        (1, torch.zeros(2, dtype=torch.float64)),
        (2, torch.full((3,), 4)),
        (2, torch.full((3,), -1)),
        (3, torch.zeros(10, dtype=torch.float64)),
        (4, torch.zeros(3, 3, dtype=torch.int32)),
        (5, torch.zeros(3, 4, dtype=torch.int64)),
    ],
)
def test_the_kernel_refuses_columns_that_it_would_write_beyond(changed: int, column: Tensor) -> None:
    given = columns(3, 4)
    native.extension.percentiles(*given, 0.5, 10, 0, math.inf)
    before = [c.clone() for c in given]
    given[changed] = column
    with pytest.raises((TypeError, ValueError), match=r"column|tensor"):
        native.extension.percentiles(*given, 0.5, 10, 0, math.inf)
    for i, kept in enumerate(before):
        assert i == changed or torch.equal(kept, given[i])
