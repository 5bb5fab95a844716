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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchclip._core import joint_norms
from torchclip._core.batch import Norms
from torchclip.thresholds import AdaGC, Percentile, RollingSigma, Threshold, ZScore
from torchclip.thresholds.bank import ThresholdBank
from torchclip.thresholds.forms import Tensors
from torchclip.thresholds.learned import Rows

INF, NAN, ABSENT = math.inf, math.nan, -1.0
REPEATABLE = settings(deadline=None, derandomize=True, max_examples=5)
CPU = torch.device("cpu")

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


def rows_of(thresholds: Sequence[Any]) -> Rows:
    return Rows(named(thresholds), CPU)


def named(thresholds: Sequence[Any], first: int = 0) -> dict[str, Any]:
    return {f"set {i}": threshold for i, threshold in enumerate(thresholds, start=first)}


def together(rows: Rows, norms: Sequence[float]) -> list[float]:
    names = list(rows.names)[: len(norms)]
    answers = rows.update(names, torch.tensor(norms, dtype=torch.float64), 2.0)
    assert isinstance(answers, Tensor)
    assert answers.dtype == torch.float64
    found = [NAN if norm == ABSENT else answer for norm, answer in zip(norms, answers.tolist(), strict=True)]
    assert all(answer >= 0 or answer != answer for answer in found), "a threshold is at least 0"
    return found


def assert_same_states(rows: Rows, thresholds: Sequence[Threshold]) -> None:
    for row, threshold in zip(rows.thresholds.values(), thresholds, strict=True):
        actual = row.state_dict()
        expected = threshold.state_dict()
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, (float, list)):
                np.testing.assert_allclose(actual[key], value, rtol=1e-9)
            else:
                assert actual[key] == value
                assert type(actual[key]) is type(value)
        threshold.load_state_dict(json.loads(json.dumps(actual, allow_nan=False)))


@every_case
@given(seed=st.integers(0, 2**32))
@REPEATABLE
def test_rows_answer_as_single_thresholds_do(make: Callable[[], Any], seed: int) -> None:
    for any_may_be in (Tensors.any, lambda *_: True):  # in host memory, and on a device
        thresholds = [make() for _ in range(7)]
        rows = rows_of(thresholds)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensors, "any", any_may_be)
            for norms in random_norms(seed, 60, 7):
                np.testing.assert_allclose(together(rows, norms), singly(thresholds, norms), rtol=1e-9)
        assert_same_states(rows, thresholds)


@every_case
@given(seed=st.integers(0, 2**32), stop=st.integers(0, 40))
@REPEATABLE
def test_rows_go_on_from_what_floats_learned(make: Callable[[], Any], seed: int, stop: int) -> None:
    steps = random_norms(seed, 60, 5)
    thresholds = [make() for _ in range(5)]
    for norms in steps[:stop]:
        singly(thresholds, norms)
    rows = rows_of(thresholds)
    assert_same_states(rows, thresholds)
    for norms in steps[stop:]:
        np.testing.assert_allclose(together(rows, norms), singly(thresholds, norms), rtol=1e-9)


@every_case
def test_rows_resume_exactly(make: Callable[[], Any]) -> None:
    steps = random_norms(1, 120, 5)
    first = rows_of([make()] * 5)
    for stop in (2, 60, 90):
        resumed = [make() for _ in range(5)]
        for threshold, row in zip(resumed, first.thresholds.values(), strict=True):
            threshold.load_state_dict(row.state_dict())
        second = rows_of(resumed)
        for norms in steps[stop - 2 : stop + 30]:
            assert together(first, norms) == pytest.approx(together(second, norms), rel=0, abs=0, nan_ok=True)


@every_case
def test_rows_can_be_added(make: Callable[[], Any]) -> None:
    steps = random_norms(2, 60, 6)
    thresholds = [make() for _ in range(6)]
    rows = rows_of([make()] * 2)
    for norms in steps[:20]:
        np.testing.assert_allclose(together(rows, norms[:2]), singly(thresholds[:2], norms[:2]), rtol=1e-9)
    rows.add(named([make()] * 4, first=2))
    for norms in steps[20:]:
        np.testing.assert_allclose(together(rows, norms), singly(thresholds, norms), rtol=1e-9)


class Operations(TorchDispatchMode):
    """Counts the torch operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@every_case
def test_nothing_waits_and_operations_do_not_grow(make: Callable[[], Any]) -> None:
    meta, counts = torch.device("meta"), []
    for size in (1, 600):
        rows = Rows(named([make()] * size), meta)
        norms = torch.ones(size, dtype=torch.float64, device=meta)
        for _ in range(4):
            with Operations() as operations:
                answers = rows.update([*rows.names], norms, 2.0)
            assert isinstance(answers, Tensor)
            assert answers.device == meta
            counts.append(operations.count)
    assert len(set(counts)) == 1


# --- the bank --------------------------------------------------------------------------------------------


def asked(bank: ThresholdBank, step: int, names: Sequence[str], norms: Norms) -> Any:
    """The thresholds of a bank in one step."""
    bank.begin_step(step)
    return bank.max_norms(names, norms)


def names_of(count: int) -> list[str]:
    return [f"group 0, parameter {i}" for i in range(count)]


@every_case
def test_the_bank_looks_the_same_in_all_forms(make: Callable[[], Any]) -> None:
    steps, names = random_norms(3, 40, 20), names_of(20)
    rule, thresholds = ThresholdBank(make()), [make() for _ in range(20)]
    for i, norms in enumerate(steps):
        answers = asked(rule, i, names, norms)
        found = [NAN if norm == ABSENT else float(a) for a, norm in zip(answers, norms, strict=True)]
        np.testing.assert_allclose(found, singly(thresholds, norms), rtol=1e-9)
    assert list(rule.thresholds) == list(rule.state_dict()) == names
    for threshold, mine in zip(thresholds, rule.thresholds.values(), strict=True):
        assert repr(mine) == repr(threshold)
        assert mine.update(1.0) == pytest.approx(threshold.update(1.0))


@every_case
def test_a_default_device_elsewhere_does_not_matter(make: Callable[[], Any]) -> None:
    steps, names = random_norms(8, 8, 20), names_of(20)
    rule, other = ThresholdBank(make()), ThresholdBank(make())
    for i, norms in enumerate(steps):
        chosen = slice(0, 18 if i % 2 else 20)
        with torch.device("meta"):
            answers = asked(rule, i, names[chosen], norms[chosen])
        expected = asked(other, i, names[chosen], norms[chosen])
        np.testing.assert_array_equal(np.asarray(answers), np.asarray(expected))


@every_case
def test_sets_come_and_go(make: Callable[[], Any]) -> None:
    rule, names = ThresholdBank(make()), names_of(30)
    thresholds = {name: make() for name in names}
    rng = np.random.default_rng(4)
    for step in range(40):
        chosen = sorted(rng.choice(20 if step < 15 else 30, size=18, replace=False).tolist())
        norms = rng.lognormal(size=18).tolist()
        answers = asked(rule, step, [names[i] for i in chosen], norms)
        expected = singly([thresholds[names[i]] for i in chosen], norms)
        np.testing.assert_allclose(np.asarray(answers), expected, rtol=1e-9)


@every_case
@pytest.mark.parametrize("size", [1, 20])
def test_a_saved_rule_goes_on_in_either_form(make: Callable[[], Any], size: int) -> None:
    names, steps = names_of(20), random_norms(5, 60, 20)
    rule, other = ThresholdBank(make()), ThresholdBank(make())
    for i, norms in enumerate(steps[:30]):
        for j in range(0, 20, size):
            asked(rule, i, names[j : j + size], norms[j : j + size])
    other.load_state_dict(json.loads(json.dumps(rule.state_dict(), allow_nan=False)))
    for i, norms in enumerate(steps[30:]):
        np.testing.assert_allclose(
            np.asarray(asked(other, i, names, norms)),
            np.asarray(asked(rule, i, names, norms)),
            rtol=1e-9,
        )


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
        return 2 * norm

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
    assert rule.runs_user_code
    assert not rule.answers_tensors
    norms = [float(i) for i in range(20)]
    assert asked(rule, 0, names, norms) == [2 * norm for norm in norms]
    assert asked(rule, 1, names, torch.tensor(norms).double()) == [2 * norm for norm in norms]


def test_what_the_rule_says_of_itself() -> None:
    assert not ThresholdBank(1.0).runs_user_code
    assert ThresholdBank(lambda step: 1.0).runs_user_code
    assert not ThresholdBank(ZScore()).runs_user_code
    assert ThresholdBank(ZScore()).answers_tensors
    assert not ThresholdBank(1.0).answers_tensors


def test_the_object_that_was_passed_stays_as_it_is_and_is_what_copies_start_from() -> None:
    threshold = ZScore(warmup=2)
    threshold.update(3.0)
    before = copy.deepcopy(threshold.state_dict())
    rule = ThresholdBank(threshold)
    asked(rule, 0, names_of(20), [5.0] * 20)
    assert threshold.state_dict() == before
    assert rule.thresholds["group 0, parameter 3"].state_dict()["mean"] == 4.0


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("count", [1, 20], ids=["objects", "rows"])
def test_a_bank_knows_what_a_percentile_had_learned_before_a_round(window: int | None, count: int) -> None:
    names, numbers = [f"set {i}" for i in range(count)], random.Random(0)
    bank = ThresholdBank(Percentile(30.0, window), in_rounds=True)
    bank.add(names)
    for round_ in range(12):
        before = repr(bank.state_dict())
        bank.begin_round()
        for _ in range(round_ % 3):
            asked(bank, 0, names, [numbers.choice([1.0, 2.0, math.nan, numbers.random()]) for _ in names])
        assert repr(bank.state_dict(in_round=True)) == before
