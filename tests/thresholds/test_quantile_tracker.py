"""The threshold of per-example clipping that follows a quantile of the examples' norms."""

import json
import math

import numpy as np
import pytest
import torch

import torchclip
from torchclip import reference
from torchclip.thresholds import QuantileTracker


def test_it_equals_its_twin() -> None:
    shares = np.random.default_rng(0).normal(0.5, 0.4, size=200).tolist()
    tracker = QuantileTracker(0.7, 0.3, 2.0)
    found = [tracker.update(share) for share in shares]
    np.testing.assert_allclose(found, reference.quantile_tracker_thresholds(shares, 0.7, 0.3, 2.0), rtol=1e-9)


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
def test_it_finds_the_quantile_of_the_examples_norms(quantile: float) -> None:
    generator = torch.Generator().manual_seed(0)
    tracker, found = QuantileTracker(quantile), []
    for step in range(400):
        examples = torch.randn(64, 10, generator=generator, dtype=torch.float64)
        _, clipped = torchclip.clip_per_example([examples], tracker.max_norm)
        tracker.update(1 - clipped / len(examples))
        if step >= 200:
            found.append(tracker.max_norm)
    norms = torch.randn(10_000, 10, generator=generator).norm(dim=1)
    assert np.mean(found) == pytest.approx(norms.quantile(quantile).item(), rel=0.05)


def test_a_state_goes_on() -> None:
    first, second = QuantileTracker(), QuantileTracker(max_norm=5.0)
    first.update(0.1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.update(0.2) == first.update(0.2)


def test_noise_may_take_the_share_out_of_its_range_and_nothing_gets_stuck() -> None:
    tracker = QuantileTracker(lr=1.0)
    for _ in range(5000):
        tracker.update(1.5)
    assert tracker.max_norm > 0
    for _ in range(5000):
        tracker.update(-0.5)
    assert 1 < tracker.max_norm < math.inf


@pytest.mark.parametrize("share", [math.nan, math.inf])
def test_shares_that_say_nothing_are_refused(share: float) -> None:
    tracker = QuantileTracker()
    with pytest.raises(ValueError, match="`share` must be finite"):
        tracker.update(share)
    assert tracker.max_norm == 0.1


def test_a_clipper_does_not_take_it_for_a_threshold_of_norms() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(TypeError, match=r"`max_norm` is a QuantileTracker.*clip_per_example"):
        torchclip.Clipper(optimizer, QuantileTracker())
