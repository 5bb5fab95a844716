"""The advice on which threshold to take, from histories of each kind."""

import math

import numpy as np
import pytest
from runs import advice_on, calm, words

from torchclip.history import Advice, History
from torchclip.reference import Array

SHARES = [0.001, 0.01, 0.05, 0.1, 0.25, 0.5]


def usable(advice: Advice) -> float:
    """The recommended number; there must be one."""
    assert advice.max_norm is not None
    assert advice.max_norm > 0
    assert f"max_norm={advice.max_norm:g}" in str(advice)
    return advice.max_norm


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
@pytest.mark.parametrize("seed", range(5))
def test_calm_norms(seed: int, scale: float) -> None:
    norms = calm(seed=seed) * scale
    advice = advice_on(norms)
    assert (advice.spikes, advice.drifts, advice.steps, advice.warmup) == (0, False, 900, 100)
    assert 0.05 < np.mean(norms > usable(advice)) < 0.15
    assert "spikes" not in str(advice)
    assert "drift" not in str(advice)


@pytest.mark.parametrize("steps", [200, 1000, 5000])
def test_the_table_holds_on_the_run_itself(steps: int) -> None:
    norms = calm(steps)
    table = advice_on(norms).table
    assert list(table) == [share for share in SHARES if share * 0.9 * steps >= 1]
    after_warmup = norms[steps // 10 :]
    for share, max_norm in table.items():
        assert np.mean(after_warmup > max_norm) == pytest.approx(share, abs=1 / len(after_warmup))
    assert list(table.values()) == sorted(table.values(), reverse=True)


@pytest.mark.parametrize("where", [[150], [150, 151, 700], [120, 999], list(range(120, 1000, 40))])
@pytest.mark.parametrize("seed", range(3))
def test_spikes_are_counted_and_clipped(where: list[int], seed: int) -> None:
    norms = calm(seed=seed)
    norms[where] *= 30
    advice = advice_on(norms)
    assert advice.spikes == len(where)
    assert not advice.drifts
    max_norm = usable(advice)
    assert (norms[where] > max_norm).all()
    assert np.mean(np.delete(norms, where) > max_norm) < 0.03
    largest = where[int(np.argmax(norms[where]))]
    assert f"(step {largest})" in words(advice)


@pytest.mark.parametrize("end", [0.1, 0.2, 5.0, 10.0])
def test_norms_that_drift(end: float) -> None:
    norms = calm() * np.geomspace(1.0, end, 1000)
    advice = advice_on(norms)
    assert advice.drifts
    assert advice.spikes == 0
    assert "drift" in str(advice)
    assert "Percentile" not in str(advice), "one recommendation"
    assert "spikes" not in str(advice)
    max_norm = usable(advice)
    # The share is that of the whole run, and an early step's need remains.
    clipped = np.mean(norms > max_norm)
    assert 0 < clipped < 0.25
    assert f"clipped {clipped:.1%} of the steps" in words(advice)
    assert max_norm > 0.9 * np.median(norms[:100])


@pytest.mark.parametrize("change", [300, 500, 800])
@pytest.mark.parametrize("ratio", [0.2, 5.0])
def test_two_regimes_drift_and_the_later_one_counts(change: int, ratio: float) -> None:
    norms = calm()
    norms[change:] *= ratio
    advice = advice_on(norms)
    assert advice.drifts
    assert advice.spikes == 0
    assert 0.4 * ratio < usable(advice) < 3 * max(1.0, ratio)


def test_drift_and_spikes_at_once() -> None:
    norms = calm() * np.geomspace(10.0, 1.0, 1000)
    norms[[200, 900]] *= 40
    advice = advice_on(norms)
    assert (advice.spikes, advice.drifts) == (2, True)
    assert "spikes" in str(advice)
    assert "drift" in str(advice)
    assert 5 < usable(advice) < 15


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_steps_that_are_not_finite_do_not_count(value: float) -> None:
    norms = calm()
    expected = advice_on(norms[np.arange(1000) % 100 != 50])
    norms[np.arange(1000) % 100 == 50] = value
    advice = advice_on(norms)
    assert advice.nonfinite == 10
    assert advice.steps == 891
    assert advice.max_norm == expected.max_norm
    assert "10 steps" in str(advice)
    assert "nonfinite='skip'" in str(advice)


@pytest.mark.parametrize("steps", [1, 200])
def test_a_run_without_a_finite_norm(steps: int) -> None:
    advice = advice_on([math.nan, math.inf][:steps] * max(steps // 2, 1))
    assert (advice.max_norm, advice.table, advice.spikes, advice.drifts, advice.steps) == (
        None,
        {},
        0,
        False,
        0,
    )
    assert "no step had a finite norm" in str(advice)


@pytest.mark.parametrize("steps", [0, 1, 49])
def test_too_early(steps: int) -> None:
    advice = advice_on(calm(steps))
    assert (advice.max_norm, advice.table, advice.spikes, advice.drifts) == (None, {}, 0, False)
    counted = "1 step had" if steps == 1 else f"{steps} steps had"
    expected = f"early for advice: {counted}" if steps else "No advice: no step has been recorded yet."
    assert expected in str(advice)
    assert advice_on(calm(50)).steps == 45
    usable(advice_on(calm(50)))


def test_no_threshold_of_0_is_ever_advised() -> None:
    assert advice_on([0.0] * 200).max_norm is None
    assert "nearly all norms are 0" in str(advice_on([0.0] * 200 + [1.0]))
    advice = advice_on([0.0, 1.0] * 100)
    assert usable(advice) >= 1.0
    assert "The norm of 100 steps of 200 is 0" in str(advice)
    assert not advice.table


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.05])
def test_norms_that_hardly_vary_need_no_clipping(spread: float) -> None:
    norms = 0.25 * calm(200, spread=spread)
    advice = advice_on(norms)
    assert (advice.spikes, advice.drifts, advice.explodes) == (0, False, None)
    assert usable(advice) > norms.max()
    assert "Clipping is not needed" in str(advice)
    assert "safeguard" in str(advice)


@pytest.mark.parametrize("steps", [60, 200, 1000, 5000])
@pytest.mark.parametrize("rate", [0.8, 0.95])
def test_norms_that_fall_to_0_have_no_spikes_and_their_first_steps_count(steps: int, rate: float) -> None:
    advice = advice_on(20 * rate ** np.arange(steps))
    assert advice.drifts
    assert (advice.spikes, advice.explodes) == (0, None)
    assert 1 < usable(advice) < 20


def test_spikes_at_the_end_may_be_an_explosion() -> None:
    norms = calm()
    norms[-3:] *= 1e6
    assert "perhaps the run has just exploded" in words(advice_on(norms))
    norms[-1] /= 1e6
    assert "exploded" not in str(advice_on(norms))


def test_spikes_above_norms_that_hardly_vary_are_clipped_alone() -> None:
    norms = calm(200, spread=0.02)
    norms[[100, 150]] *= 30
    advice = advice_on(norms)
    assert 1.2 < usable(advice) < 25
    assert "clipped the 2 spikes and 0 other steps" in str(advice)


@pytest.mark.parametrize("levels", [[3.0], [1.0, 2.0], [1.0, 20.0]])
def test_rows_that_are_shown_are_distinct_and_true(levels: list[float]) -> None:
    norms = np.random.default_rng(0).choice(levels, 300)
    advice = advice_on(norms)
    for share, max_norm in advice.table.items():
        assert np.mean(norms[30:] > max_norm) == pytest.approx(share, abs=0.3 * share)
    assert len({f"{max_norm:.3g}" for max_norm in advice.table.values()}) == len(advice.table)


def test_the_start_of_a_run_does_not_count() -> None:
    norms = calm()
    norms[:80] *= np.geomspace(1000, 1, 80)
    advice = advice_on(norms)
    assert (advice.spikes, advice.drifts) == (0, False)
    assert advice.max_norm == advice_on(calm()).max_norm
    assert "after the first 100" in str(advice)


def test_a_history_that_has_forgotten_the_start_uses_all_it_has() -> None:
    for maxlen, steps, warmup in [(500, 500, 0), (950, 900, 50)]:
        history = History(maxlen)
        for step, norm in enumerate(calm(1000)):
            history.append(step, float(norm), math.inf, 1.0)
        advice = history.suggest()
        assert (advice.steps, advice.warmup) == (steps, warmup)


def test_the_words_fit_a_terminal() -> None:
    norms = calm() * np.geomspace(10.0, 1.0, 1000)
    norms[[200, 900]] *= 40
    norms[300] = math.nan
    assert max(map(len, str(advice_on(norms)).splitlines())) <= 80


def spiky() -> Array:
    norms = calm(400)
    norms[200] *= 40
    return norms


@pytest.mark.parametrize(
    ("norms", "sentence"),
    [
        (
            np.where(np.arange(400) < 45, calm(400), 0),
            "Too early for advice: 45 steps had a norm above 0, and advice ",
        ),
        (
            np.where(np.arange(1000) < 102, calm(), 0),
            "No advice: only 2 steps after the first tenth had a norm above 0; advice needs 8.",
        ),
        (
            np.where(np.arange(400) < 1, 1, 1e6 * calm(400)),
            "Use max_norm=0.33, a third of the norm of the step ",
        ),
        (
            np.where(np.arange(400) < 20, 1, 1e4) * calm(400),
            "Use max_norm=0.27, a third of the lower quartile of the 20 steps before. If the norms leave "
            "that range again, lower the learning rate.",
        ),
        (np.where(np.arange(400) < 200, 1, 1000) * calm(400), "is 944 since then, 930 times as large."),
        (
            calm(200, spread=0.02),
            "(0.953 to 1.04), and a lower threshold only shortens steps. As a safeguard use",
        ),
        (
            np.where(np.arange(1000) % 100 == 50, np.nan, calm()),
            "Not finite: the norm of 10 steps of 1,000. No threshold helps there; Clipper(..., "
            "nonfinite='skip') skips these steps.",
        ),
        (
            np.where(np.arange(200) == 50, 0, calm(200)),
            "The norm of 1 step of 200 is 0; these do not count.",
        ),
        (spiky(), "Use max_norm=2. It would have clipped the spike and 4 other steps of 360."),
        (spiky(), "The spikes: 1 step, up to 33.5 times the norm around them (step 200)."),
        (
            20 * 0.9 ** np.arange(200),
            "The run converges; a threshold that follows the norms, such as Percentile, would stop it.",
        ),
        (
            calm() * np.geomspace(1, 10, 1000),
            "are the medians of four equal parts of the run after its start.",
        ),
    ],
)
def test_each_sentence_has_an_example(norms: Array, sentence: str) -> None:
    assert sentence in words(advice_on(norms))
