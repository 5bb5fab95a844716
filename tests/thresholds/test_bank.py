"""Thresholds of many sets at once, compared with those of one, and the bank that chooses between them."""

import copy
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from distributed_helpers import TORCH
from helpers import Operations
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from torchclip._core import joint_norms
from torchclip.thresholds import AdaGC, Percentile, RollingSigma, Threshold, ZScore, forms
from torchclip.thresholds.bank import ThresholdBank
from torchclip.thresholds.forms import Tensors

INF, NAN, ABSENT = math.inf, math.nan, -1.0

CASES: dict[str, Callable[[], Any]] = {
    "ZScore": lambda: ZScore(warmup=5),
    "ZScore mean": lambda: ZScore(warmup=3, threshold=1.0, clip_option="mean"),
    "ZScore percentile": lambda: ZScore(warmup=3, threshold=1.0, clip_option="percentile", max_norm=3.0),
    "ZScore skip": lambda: ZScore(alpha=0.8, warmup=4, threshold=1.0, skip_update_on_spike=True),
    "ZScore 1": lambda: ZScore(alpha=0.5, warmup=1, threshold=2.0),
    "AdaGC": lambda: AdaGC(warmup=10, max_norm=3.0),
    "AdaGC 1": lambda: AdaGC(relative=0.9, beta=0.5, warmup=1),
    "RollingSigma": lambda: RollingSigma(window=20, warmup=10),
    "RollingSigma 2": lambda: RollingSigma(sigma=1.0, window=7, warmup=2),
    "RollingSigma wide": lambda: RollingSigma(sigma=1.5, window=200, warmup=30),
    "Percentile": lambda: Percentile(30.0, window=9),
    "Percentile max": lambda: Percentile(100.0, window=25, warmup=5, max_norm=2.0),
    "Percentile min": lambda: Percentile(0.0, window=1, warmup=2),
}
every_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())


def random_norms(seed: int, steps: int, count: int) -> list[list[float]]:
    """Norms over steps, with spikes, zeros, infinities, NaN and missing gradients."""
    rng = np.random.default_rng(seed)
    norms = rng.lognormal(sigma=0.5, size=(steps, count)) * 10.0 ** rng.integers(-6, 6, size=count)
    norms[rng.random(norms.shape) < 0.05] *= 100
    for value in (0.0, INF, NAN, ABSENT):
        norms[rng.random(norms.shape) < 0.05] = value
    norms[:, 0] = norms[norms[:, 0] != ABSENT][0, 0]  # constant
    drawn: list[list[float]] = norms.tolist()
    return drawn


def singly(thresholds: Sequence[Threshold], norms: Sequence[float]) -> list[float]:
    """The thresholds of the float form; NaN where there is no gradient."""
    total_norm = joint_norms.join_numbers([norm for norm in norms if 0 <= norm < INF] or [0.0], 2.0)
    joint = {"total_norm": total_norm} if isinstance(thresholds[0], AdaGC) else {}
    return [
        NAN if norm == ABSENT else threshold.update(norm, **joint)
        for threshold, norm in zip(thresholds, norms, strict=True)
    ]


def names_of(count: int) -> list[str]:
    return [f"group 0, parameter {i}" for i in range(count)]


def asked(
    bank: ThresholdBank, step: int, names: Sequence[str], norms: Sequence[float], on_device: bool = False
) -> list[float]:
    """The thresholds of a bank in one step, for norms in host memory or as on a device."""
    bank.begin_step()
    given = torch.tensor(norms, dtype=torch.float64) if on_device else [*norms]
    answers: Any = bank.max_norms(names, given, step=step)
    if isinstance(answers, Tensor):
        assert answers.dtype == torch.float64
        answers = answers.tolist()
    found = [NAN if norm == ABSENT else answer for norm, answer in zip(norms, answers, strict=True)]
    assert all(answer >= 0 or answer != answer for answer in found), "a threshold is at least 0"
    return found


def assert_learned(bank: ThresholdBank, names: Sequence[str], thresholds: Sequence[Threshold]) -> None:
    """Assert that the sets of a bank have learned what single thresholds have."""
    assert list(bank.thresholds) == list(bank.state_dict()) == names
    for row, threshold in zip(bank.thresholds.values(), thresholds, strict=True):
        assert repr(row) == repr(threshold)
        actual, expected = row.state_dict(), threshold.state_dict()
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, (float, list)):
                np.testing.assert_allclose(actual[key], value, rtol=1e-9)
            else:
                assert actual[key] == value
                assert type(actual[key]) is type(value)


@every_case
@pytest.mark.parametrize("count", [5, 20], ids=["few", "many"])
@given(seed=st.integers(0, 2**32), stop=st.integers(0, 40))
@settings(max_examples=5)
def test_sets_learn_as_single_thresholds_do_wherever_norms_are(
    make: Callable[[], Any], count: int, seed: int, stop: int
) -> None:
    steps, names = random_norms(seed, 60, count), names_of(count)
    for any_may_be in (Tensors.any, lambda _: True):  # in host memory, and on a device
        bank, thresholds = ThresholdBank(make()), [make() for _ in names]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensors, "any", staticmethod(any_may_be))
            for step, norms in enumerate(steps):
                found = asked(bank, step, names, norms, on_device=stop <= step < 50)
                np.testing.assert_allclose(found, singly(thresholds, norms), rtol=1e-9)
                if step in (stop, 59):
                    assert_learned(bank, names, thresholds)


everywhere = pytest.mark.parametrize(
    ("count", "on_device"), [(5, False), (20, False), (5, True)], ids=["few", "many", "on a device"]
)


@every_case
@everywhere
def test_a_saved_bank_goes_on_exactly(make: Callable[[], Any], count: int, on_device: bool) -> None:
    steps, names, first = random_norms(1, 120, count), names_of(count), ThresholdBank(make())
    for stop in (2, 60, 90):
        second = ThresholdBank(make())
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        for step in range(stop - 2, stop + 30):
            found = asked(first, step, names, steps[step], on_device)
            np.testing.assert_array_equal(found, asked(second, step, names, steps[step], on_device))


@every_case
@everywhere
def test_sets_come_and_go(make: Callable[[], Any], count: int, on_device: bool) -> None:
    bank, names, rng = ThresholdBank(make()), names_of(count + 10), np.random.default_rng(4)
    thresholds = {name: make() for name in names}
    for step in range(40):
        if step == 5:
            bank.add(names[: count + 5])
        known = count if step < 15 else count + 10
        chosen = (
            [*range(count)] if step < 10 else sorted(rng.choice(known, count - 2, replace=False).tolist())
        )
        norms = rng.lognormal(size=len(chosen)).tolist()
        found = asked(bank, step, [names[i] for i in chosen], norms, on_device)
        np.testing.assert_allclose(found, singly([thresholds[names[i]] for i in chosen], norms), rtol=1e-9)


@every_case
def test_a_default_device_elsewhere_does_not_matter(make: Callable[[], Any]) -> None:
    steps, names = random_norms(8, 8, 20), names_of(20)
    bank, other = ThresholdBank(make()), ThresholdBank(make())
    for step, norms in enumerate(steps):
        chosen = slice(0, 18 if step % 2 else 20)
        with torch.device("meta"):
            found = asked(bank, step, names[chosen], norms[chosen])
        np.testing.assert_array_equal(found, asked(other, step, names[chosen], norms[chosen]))


@everywhere
def test_a_mean_that_rounds_to_0_is_a_number(count: int, on_device: bool) -> None:
    bank = ThresholdBank(RollingSigma(window=2, warmup=2))
    for step, norm in enumerate([5e-324, 0.0, 0.0]):
        found = asked(bank, step, names_of(count), [norm] * count, on_device)
    assert all(0 <= max_norm < 1e-300 for max_norm in found)


@everywhere
@pytest.mark.parametrize(("max_norm", "expected"), [(0.0, 0.0), (1e-309, 1e-309), (1.0, 2e-309)])
def test_the_smallest_norms_are_clipped_in_the_warm_up(
    count: int, on_device: bool, max_norm: float, expected: float
) -> None:
    bank = ThresholdBank(AdaGC(max_norm=max_norm))
    first, *others = asked(bank, 0, names_of(count), [2e-309, *[0.0] * (count - 1)], on_device)
    assert first == pytest.approx(expected, rel=1e-9, abs=0)
    assert others == [0.0] * (count - 1)


@every_case
def test_nothing_waits_and_operations_do_not_grow(make: Callable[[], Any]) -> None:
    meta, counts = torch.device("meta"), []
    for size in (1, 600):
        bank, names = ThresholdBank(make()), names_of(size)
        norms = torch.ones(size, dtype=torch.float64, device=meta)
        bank.max_norms(names, norms)
        for _ in range(4):
            bank.begin_step()
            with Operations() as operations:
                answers = bank.max_norms(names, norms)
            assert isinstance(answers, Tensor)
            assert answers.device == meta
            counts.append(len(operations.names))
    assert len(set(counts)) == 1


@every_case
def test_nothing_is_read_where_operations_are_intercepted(make: Callable[[], Any]) -> None:
    bank = ThresholdBank(make())
    if isinstance(make(), Percentile) and TORCH < (2, 10):
        pytest.skip("on the CPU, this torch reads a number for each quantile")
    with FakeTensorMode():
        for _ in range(3):
            bank.begin_step()
            assert isinstance(bank.max_norms(names_of(3), torch.ones(3, dtype=torch.float64)), Tensor)


@pytest.mark.parametrize("count", [1, 20])
def test_what_is_not_there_is_no_observation(count: int) -> None:
    rule, names = ThresholdBank(ZScore(warmup=2)), names_of(count)
    for step in range(5):
        asked(rule, step, names, [ABSENT] * count)
    assert all(
        threshold.state_dict() == ZScore(warmup=2).state_dict() for threshold in rule.thresholds.values()
    )


class Own:
    """A user's threshold that cannot handle tensors."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def update(self, norm: float) -> float:
        assert type(norm) is float
        self.seen.append(norm)
        return 2 * norm if math.isfinite(norm) else INF

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"]


class OwnZScore(ZScore):
    """A user's subclass of a threshold, whose change the tensor form does not have."""

    def update(self, norm: float) -> float:
        return 2 * norm


@pytest.mark.parametrize("threshold", [Own(), OwnZScore()])
def test_a_users_own_object_is_asked_with_floats(threshold: Threshold) -> None:
    rule, names = ThresholdBank(threshold), names_of(20)
    assert rule.learns
    assert not rule.is_ours
    assert not rule.answers_tensors
    norms = [float(i) for i in range(20)]
    assert asked(rule, 0, names, norms) == [2 * norm for norm in norms]
    assert asked(rule, 1, names, norms, on_device=True) == [2 * norm for norm in norms]


def test_quantiles_of_more_numbers_than_torch_takes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    norms, names = random_norms(0, 12, 5), names_of(5)
    at_once, in_parts = ThresholdBank(Percentile(30.0, window=9)), ThresholdBank(Percentile(30.0, window=9))
    for step, of_step in enumerate(norms):
        expected = asked(at_once, step, names, of_step, on_device=True)
        with monkeypatch.context() as patch:
            patch.setattr(forms, "_MOST", 2 * 9)
            assert asked(in_parts, step, names, of_step, on_device=True) == expected


def test_what_the_bank_says_of_itself() -> None:
    said = [(1.0, True, False), (lambda step: 1.0, False, False), (ZScore(), True, True)]
    for max_norm, is_ours, answers_tensors in said:
        bank = ThresholdBank(max_norm)  # type: ignore[arg-type]
        assert (bank.is_ours, bank.answers_tensors) == (is_ours, answers_tensors)


def test_the_object_that_was_passed_stays_as_it_is_and_is_what_copies_start_from() -> None:
    threshold = ZScore(warmup=2)
    threshold.update(3.0)
    before = copy.deepcopy(threshold.state_dict())
    rule = ThresholdBank(threshold)
    asked(rule, 0, names_of(20), [5.0] * 20)
    assert threshold.state_dict() == before
    assert rule.thresholds["group 0, parameter 3"].state_dict()["mean"] == 4.0


@pytest.mark.parametrize("threshold", [Percentile(30.0), Percentile(30.0, 3), Own()])
@pytest.mark.parametrize("count", [1, 20], ids=["objects", "rows"])
def test_a_bank_knows_what_was_learned_before_a_step(threshold: Threshold, count: int) -> None:
    names, numbers = [f"set {i}" for i in range(count)], random.Random(0)
    bank = ThresholdBank(threshold)
    bank.add(names)
    for step in range(12):
        before = repr(bank.state_dict())
        bank.begin_step()
        for _ in range(step % 3):  # calls of a closure
            bank.max_norms(names, [numbers.choice([1.0, 2.0, NAN, numbers.random()]) for _ in names])
        assert repr(bank.state_dict(ended=False)) == before
