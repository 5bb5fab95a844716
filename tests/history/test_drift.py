"""Which norms drift: a trend after the start of a run that chance does not explain."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from runs import advice_on

from torchclip.reference import Array

SEEDS = 25
Noise = Callable[[np.random.Generator, int], Array]


def drifting(make: Callable[[np.random.Generator, int], Array], steps: int) -> int:
    """How many of the runs drift, from the logarithms of their norms."""
    return sum(advice_on(np.exp(make(np.random.default_rng(seed), steps))).drifts for seed in range(SEEDS))


def returning(memory: float, deviation: float) -> Noise:
    """A random walk that returns to its mean."""

    def make(rng: np.random.Generator, steps: int) -> Array:
        found = [rng.normal(scale=deviation)]
        for change in rng.normal(scale=deviation * math.sqrt(1 - memory**2), size=steps - 1):
            found.append(memory * found[-1] + change)
        return np.array(found)

    return make


CHANCE: dict[str, Noise] = {
    "calm": lambda rng, steps: rng.normal(scale=0.3, size=steps),
    "wide": lambda rng, steps: rng.normal(scale=0.8, size=steps),
    "heavy tails": lambda rng, steps: 0.4 * rng.standard_t(2, size=steps),
    "short memory": returning(0.5, 0.5),
    "long memory": returning(0.9, 0.5),
}


@pytest.mark.parametrize("steps", [100, 200, 1000])
@pytest.mark.parametrize("noise", CHANCE.values(), ids=CHANCE)
def test_chance_is_no_drift(noise: Noise, steps: int) -> None:
    assert drifting(noise, steps) <= 1


@pytest.mark.parametrize("memory", [0.95, 0.98, 0.99])
@pytest.mark.parametrize("steps", [100, 300, 1000])
def test_a_walk_that_returns_slowly_is_seldom_taken_for_a_drift(memory: float, steps: int) -> None:
    """In a hundred steps it hardly returns, and looks like a drift."""
    assert drifting(returning(memory, 0.5), steps) <= 2


STARTS: dict[str, Callable[[Array], Array]] = {
    "falls within a tenth": lambda at: np.log(1 + 4 * np.exp(-at / (0.1 * len(at)))),
    "falls far and early": lambda at: np.log(1 + 8 * np.exp(-at / (0.05 * len(at)))),
    "falls ever more slowly": lambda at: -0.3 * np.log1p(at),
    "falls until three tenths": lambda at: -np.log1p(np.minimum(at, 0.3 * len(at)) / (0.03 * len(at))),
    "warms up": lambda at: np.log(np.minimum((at + 1) / (0.1 * len(at)), 1)),
}


@pytest.mark.parametrize("steps", [100, 200, 1000])
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_the_start_is_no_drift(start: Callable[[Array], Array], steps: int) -> None:
    def norms(rng: np.random.Generator, steps: int) -> Array:
        return start(np.arange(steps)) + rng.normal(scale=0.25, size=steps)

    assert drifting(norms, steps) <= 1


@pytest.mark.parametrize(("steps", "ratio"), [(1000, 2.0), (1000, 0.5), (100, 12.0), (100, 1 / 12)])
def test_a_small_change_does_not_matter_nor_one_as_training_begins(steps: int, ratio: float) -> None:
    """Of 100 steps the second half counts, in which a change to 12 times is one to 2.5 times."""

    def norms(rng: np.random.Generator, steps: int) -> Array:
        return np.linspace(0, math.log(ratio), steps) + rng.normal(scale=0.1, size=steps)

    assert drifting(norms, steps) <= 1


@pytest.mark.parametrize("ratio", [4.0, 0.25, 10.0, 0.1])
@pytest.mark.parametrize(("steps", "deviation"), [(300, 0.2), (1000, 0.3), (1000, 0.5)])
def test_a_trend_is_a_drift(ratio: float, steps: int, deviation: float) -> None:
    def norms(rng: np.random.Generator, steps: int) -> Array:
        return np.linspace(0, math.log(ratio), steps) + rng.normal(scale=deviation, size=steps)

    assert drifting(norms, steps) >= SEEDS - 1


def test_a_large_trend_is_seen_in_a_short_run() -> None:
    def norms(rng: np.random.Generator, steps: int) -> Array:
        return np.linspace(0, math.log(10), steps) + rng.normal(scale=0.3, size=steps)

    assert drifting(norms, 200) >= 0.8 * SEEDS
