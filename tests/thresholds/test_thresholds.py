"""Thresholds: the streaming objects against their NumPy twins, and the promises of their docstrings."""

import copy
import json
import math
import pickle
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchclip import reference
from torchclip.thresholds import AdaGC, Percentile, QuantileTracker, RollingSigma, Threshold, ZScore

INF = math.inf
norms = st.lists(
    st.one_of(
        st.floats(min_value=0, max_value=1e300),
        st.integers(0, 3).map(float),  # ties
        st.sampled_from([INF, math.nan]),
    ),
    max_size=60,
)
ceilings = st.sampled_from([INF, 1.0, 0.0])
percentile_options = st.fixed_dictionaries(
    {
        "percentile": st.one_of(st.floats(0, 100), st.sampled_from([0.0, 10.0, 50.0, 100.0])),
        "window": st.one_of(st.none(), st.integers(1, 20)),
        "warmup": st.integers(0, 10),
        "max_norm": ceilings,
    }
)
zscore_options = st.fixed_dictionaries(
    {
        "alpha": st.sampled_from([0.0, 0.5, 0.97, 1.0]),
        "threshold": st.sampled_from([0.5, 1.0, 2.5]),
        "warmup": st.integers(1, 10),
        "clip_option": st.sampled_from(["adaptive_scaling", "mean", "percentile"]),
        "skip_update_on_spike": st.booleans(),
        "max_norm": ceilings,
    }
)


def noisy_norms(seed: int, steps: int = 120) -> list[float]:
    """A run with spikes and non-finite norms. Random numbers: none lies on the border of being a spike."""
    rng = np.random.default_rng(seed)
    norms = rng.lognormal(sigma=0.5, size=steps) * 10.0 ** rng.integers(-6, 6)
    norms[rng.random(steps) < 0.05] *= 100
    norms[rng.random(steps) < 0.05] = INF
    norms[rng.random(steps) < 0.05] = math.nan
    drawn: list[float] = norms.tolist()
    return drawn


def stream(threshold: Threshold, norms: Iterable[float]) -> list[float]:
    return [threshold.update(norm) for norm in norms]


# --- against the twins -----------------------------------------------------------------------------


@given(norms, percentile_options)
def test_percentile_equals_numpys_percentile_at_every_step(
    norms: list[float], options: dict[str, Any]
) -> None:
    streamed = stream(Percentile(**options), norms)
    np.testing.assert_array_equal(streamed, reference.percentile_thresholds(norms, **options))


@given(st.integers(0, 2**32), zscore_options)
def test_zscore_equals_its_twin(seed: int, options: dict[str, Any]) -> None:
    norms = noisy_norms(seed)
    streamed = stream(ZScore(**options), norms)
    np.testing.assert_allclose(streamed, reference.zscore_thresholds(norms, **options), rtol=1e-9)


@given(st.integers(0, 2**32), st.sampled_from([1.0, 6.0]), st.integers(2, 60), st.integers(2, 40))
def test_rolling_sigma_equals_its_twin(seed: int, sigma: float, window: int, warmup: int) -> None:
    norms = noisy_norms(seed)
    streamed = stream(RollingSigma(sigma, window, warmup), norms)
    np.testing.assert_allclose(
        streamed, reference.rolling_sigma_thresholds(norms, sigma, window, warmup), rtol=1e-9
    )


@given(st.integers(0, 2**32), st.sampled_from([0.5, 1.05, 3.0]), st.sampled_from([0.0, 0.5, 0.98, 1.0]))
def test_adagc_equals_its_twin(seed: int, relative: float, beta: float) -> None:
    rng = np.random.default_rng(seed)
    options: dict[str, Any] = {"relative": relative, "beta": beta, "warmup": 8, "max_norm": 2.0}
    norms = np.array([noisy_norms(int(rng.integers(2**32)), 40) for _ in range(3)]).T
    norms[rng.random(norms.shape) < 0.1] = 0.0
    thresholds = [AdaGC(**options) for _ in range(3)]
    streamed = []
    for of_step in norms:
        total_norm = reference.global_norm([of_step[np.isfinite(of_step)]])
        streamed.append([t.update(n, total_norm) for t, n in zip(thresholds, of_step, strict=True)])
    np.testing.assert_allclose(streamed, reference.adagc_thresholds(norms, **options), rtol=1e-9)


def test_adagc_clips_all_together_first_and_then_each_by_its_own() -> None:
    norms = np.array([[3.0, 4.0], [0.3, 0.4], [30.0, 0.1]])
    thresholds = reference.adagc_thresholds(norms, relative=1.5, beta=0.5, warmup=2, max_norm=1.0)
    np.testing.assert_allclose(thresholds, [[0.6, 0.8], [0.3, 0.4], [0.45, 0.6]])


def test_adagc_has_no_parameter_stand_still_whose_first_norms_are_0() -> None:
    threshold = AdaGC(warmup=3)
    stream(threshold, [0.0, 0.0, 0.5, 0.4, 0.0, 0.6])
    assert threshold.update(1.0) == pytest.approx(1.05 * 0.4)
    assert threshold.update(0.0) > 0.4


@pytest.mark.parametrize("norm", [0.0, 1e-30, 0.1, 1 / 3, 1e30])
def test_rolling_sigma_does_not_clip_constant_norms(norm: float) -> None:
    for answer in stream(RollingSigma(window=50, warmup=10), [norm] * 100):
        assert norm <= answer
    assert answer == pytest.approx(norm)


# --- resuming --------------------------------------------------------------------------------------


every_kind = pytest.mark.parametrize(
    "threshold",
    [
        Percentile(window=5),
        Percentile(),
        ZScore(warmup=5),
        ZScore(warmup=50),
        AdaGC(warmup=5),
        AdaGC(),
        RollingSigma(window=9, warmup=5),
        RollingSigma(),
    ],
    ids=repr,
)


@every_kind
def test_a_state_is_a_snapshot_that_goes_on_exactly(threshold: Threshold) -> None:
    norms, threshold = noisy_norms(1), copy.deepcopy(threshold)
    for stop in range(0, 120, 13):
        state = threshold.state_dict()
        loaded, saved = copy.deepcopy(threshold), json.loads(json.dumps(state, allow_nan=False))
        expected = stream(threshold, norms[stop : stop + 13])
        for _ in range(2):  # it replaces what was learned
            loaded.load_state_dict(saved)
            assert stream(loaded, norms[stop : stop + 13]) == expected
        assert state == saved


@every_kind
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies_and_pickles_go_on_alone(threshold: Threshold, duplicate: Callable[[Any], Any]) -> None:
    norms, threshold = noisy_norms(2), copy.deepcopy(threshold)
    stream(threshold, norms[:20])
    other = duplicate(threshold)
    assert repr(other) == repr(threshold)
    assert stream(other, norms[20:]) == stream(threshold, norms[20:])


WRONG_ENTRIES: list[tuple[Any, dict[str, Any], str]] = [
    (Percentile(), {"seen": -1}, r"`state\['seen'\]` must be at least 0"),
    (Percentile(), {"seen": 1, "norms": ["2"]}, r"`state\['norms'\]` must be a number"),
    (Percentile(), {"seen": 1, "norms": [INF]}, r"`state\['norms'\]` must be finite"),
    (Percentile(window=5), {"norms": [1.0] * 6}, r"`state\['norms'\]` must be the last"),
    (ZScore(), {"mean": -1.0}, r"`state\['mean'\]` must be at least 0"),
    (ZScore(), {"std": INF}, r"`state\['std'\]` must be finite"),
    (ZScore(), {"seen": 0.5}, r"`state\['seen'\]` must be an integer"),
    (AdaGC(), {"gamma": "1"}, r"`state\['gamma'\]` must be a number"),
    (AdaGC(), {"seen": 0.5}, r"`state\['seen'\]` must be an integer"),
    (RollingSigma(), {"norms": [1.0]}, r"`state\['norms'\]` must be the last"),
    (QuantileTracker(), {"max_norm": 0.0}, r"`state\['max_norm'\]` must be above 0"),
]


@pytest.mark.parametrize(
    ("threshold", "state", "message"),
    [
        (Percentile(), ZScore().state_dict(), "kind 'ZScore'; a Percentile cannot"),
        (ZScore(), {}, "lacks 'kind'"),
        (ZScore(), {"kind": None}, "kind None"),
        (Percentile(window=5), Percentile().state_dict(), "window=None.*same window"),
        (RollingSigma(window=5), RollingSigma().state_dict(), "window=128.*same window"),
        (AdaGC(), RollingSigma().state_dict(), "kind 'RollingSigma'; an AdaGC cannot"),
        (QuantileTracker(), ZScore().state_dict(), "kind 'ZScore'; a QuantileTracker cannot"),
        (Percentile(), {"kind": "Percentile", "window": None}, "lacks 'seen', 'norms'"),
        (ZScore(), {"kind": "ZScore", "mean": 1.0, "std": 1.0}, "lacks 'seen'"),
        *(
            (threshold, {**threshold.state_dict(), **changes}, message)
            for threshold, changes, message in WRONG_ENTRIES
        ),
    ],
)
def test_the_wrong_state_is_refused_and_changes_nothing(
    threshold: Threshold, state: dict[str, Any], message: str
) -> None:
    threshold = copy.deepcopy(threshold)
    stream(threshold, [1.0, 2.0])
    before = threshold.state_dict()
    with pytest.raises((TypeError, ValueError), match=message):
        threshold.load_state_dict(state)
    assert threshold.state_dict() == before


# --- warm-up, ceiling, non-finite norms ------------------------------------------------------------


@pytest.mark.parametrize(
    "threshold",
    [Percentile(), Percentile(window=3), ZScore(warmup=2), AdaGC(warmup=2), RollingSigma(warmup=2)],
)
@pytest.mark.parametrize("norm", [INF, -INF, math.nan])
def test_a_norm_that_is_not_finite_leaves_no_trace(threshold: Threshold, norm: float) -> None:
    threshold = copy.deepcopy(threshold)
    stream(threshold, [1.0, 2.0, 3.0, 2.0])
    before = threshold.state_dict()
    assert math.isfinite(threshold.update(norm))
    assert threshold.state_dict() == before


def test_huge_norms_do_not_overflow_the_statistics() -> None:
    threshold = ZScore(warmup=3)
    answers = stream(threshold, [1e308, 1.5e308, 1.7e308, 1e-300, 1.0, 1e308])
    assert not any(map(math.isnan, answers))
    state = threshold.state_dict()
    assert math.isfinite(state["mean"])
    assert math.isfinite(state["std"])


# --- what the methods promise ----------------------------------------------------------------------


@pytest.mark.parametrize("clip_option", ["adaptive_scaling", "mean", "percentile"])
def test_what_a_spike_is_pulled_back_to(clip_option: Any) -> None:
    threshold = ZScore(threshold=2.0, warmup=2, clip_option=clip_option)
    stream(threshold, [1.0, 3.0])  # mean 2, deviation 1
    expected = {"adaptive_scaling": 2 + 2**2 / 8, "mean": 2.0, "percentile": 2 + 2 * 1.0}
    assert threshold.update(10.0) == expected[clip_option]


def test_a_spike_counts_with_what_it_is_pulled_back_to() -> None:
    threshold = ZScore(alpha=0.5, threshold=2.0, warmup=2, clip_option="percentile")
    stream(threshold, [1.0, 3.0, 1e9])  # counts as 4
    state = threshold.state_dict()
    assert state["mean"] == 3.0
    assert state["std"] == pytest.approx(1.0)  # sqrt(0.5 · 1² + 0.5 · (4 - 3)²)


@pytest.mark.parametrize("norm", [0.0, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("clip_option", ["adaptive_scaling", "mean", "percentile"])
def test_constant_norms_are_not_clipped(norm: float, clip_option: Any) -> None:
    answers = stream(ZScore(warmup=3, clip_option=clip_option), [norm] * 10)
    assert answers[3:] == pytest.approx([norm] * 7, rel=1e-12)


def test_zscore_follows_the_scale_of_the_norms() -> None:
    norms = noisy_norms(6)
    small = stream(ZScore(), [norm * 2.0**-80 for norm in norms])
    np.testing.assert_array_equal(np.array(small) * 2.0**80, stream(ZScore(), norms))


# --- arguments -------------------------------------------------------------------------------------


WRONG_ARGUMENTS: list[tuple[Callable[..., Any], str, Any, str]] = [
    (Percentile, "percentile", 101, "must be between 0 and 100, got 101"),
    (Percentile, "window", 0, "must be at least 1, got 0"),
    (Percentile, "warmup", -1, "must be at least 0, got -1"),
    (Percentile, "max_norm", -1.0, "must be at least 0, got -1.0"),
    (ZScore, "alpha", 1.1, "must be between 0 and 1, got 1.1"),
    (ZScore, "threshold", -2.5, "must be at least 0, got -2.5"),
    (ZScore, "threshold", INF, "is inf.*finite"),
    (ZScore, "warmup", 0, "must be at least 1, got 0"),
    (ZScore, "clip_option", "max", "must be one of 'adaptive_scaling', .*'max'"),
    (ZScore, "skip_update_on_spike", "yes", "must be True or False"),
    (ZScore, "max_norm", math.nan, ".*nan"),
    (AdaGC, "relative", INF, "must be finite"),
    (AdaGC, "beta", 1.5, "must be between 0 and 1, got 1.5"),
    (AdaGC, "warmup", 0, "must be at least 1, got 0"),
    (AdaGC, "max_norm", None, "must be a number"),
    (RollingSigma, "sigma", -1, "must be at least 0, got -1"),
    (RollingSigma, "window", 1, "must be at least 2, got 1"),
    (RollingSigma, "warmup", 1.0, "must be an integer"),
    (QuantileTracker, "quantile", 1.5, "must be between 0 and 1, got 1.5"),
    (QuantileTracker, "lr", -1, "must be at least 0, got -1"),
    (QuantileTracker, "max_norm", 0, "must be above 0"),
]


@pytest.mark.parametrize(("make", "argument", "value", "message"), WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(make: Callable[..., Any], argument: str, value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"`{argument}` {message}"):
        make(**{argument: value})


def test_repr_is_the_call() -> None:
    seven: Any = np.int64(7)
    for threshold in [
        Percentile(5, window=seven, warmup=3, max_norm=2),
        ZScore(0.9, 3, warmup=4, clip_option="mean", skip_update_on_spike=True, max_norm=1.5),
        AdaGC(2, 0.5, warmup=seven, max_norm=3),
        RollingSigma(3, window=seven, warmup=9),
    ]:
        assert repr(eval(repr(threshold))) == repr(threshold)
    assert repr(Percentile()) == "Percentile(percentile=10.0, window=None, warmup=0, max_norm=inf)"


@pytest.mark.parametrize("make", [Percentile, ZScore, AdaGC, RollingSigma, QuantileTracker])
def test_numbers_may_be_strings_as_configuration_files_have_them(make: Any) -> None:
    texts = {each.name: str(each.default) for each in fields(make) if isinstance(each.default, float)}
    assert repr(make(**texts)) == repr(make())
