"""The verdict on the threshold of a run: each sentence that it can say has an example here."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from runs import Threshold, calm, run_of, words

from torchclip import Clipper, Percentile, ZScore
from torchclip.history import Advice, History
from torchclip.reference import Array


def exploding() -> Array:
    return np.where(np.arange(1000) < 400, 1.0, 100.0) * calm()


AT_LEAST_FIFTY = "Too early for advice: 20 steps had a finite norm, and advice needs 50."
ALIKE = "So all batches count alike, and the learning rate alone sets how far a step goes."


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (
            (calm(), 1.6, "keep", 1.6),
            "Keep max_norm=1.6: it clips 48 of 1,000 steps, and protects against a bad batch.",
        ),
        (
            (calm(), 1.1, "keep", 1.1),
            "Keep max_norm=1.1: it clips 355 of 1,000 steps, and is between half and twice what the norms "
            "suggest, 1.4.",
        ),
        (
            (calm(spread=1.2), 1.2, "keep", 1.2),
            "Keep max_norm=1.2: it clips 413 of 1,000 steps, and nothing in this run speaks against it.",
        ),
        (
            (calm(), 4.0, "keep", 4.0),
            "Keep max_norm=4: it clips no step of this run, and protects against a bad batch.",
        ),
        (
            (calm(), lambda step: 1.9 + 0.1 * (step % 2), "keep", 1.4),
            "Keep the threshold (1.9 to 2): it clips 9 of 1,000 steps, and protects against a bad batch.",
        ),
        (
            (calm(), 100.0, "never_clips", 1.4),
            "max_norm=100 never clips: the largest norm of 1,000 steps is 2.51. Use max_norm=1.4. It would "
            "have clipped 11% of the steps and protects against a bad batch. Any number between half and "
            "twice that should work as well.",
        ),
        (
            (calm(), 0.05, "clips_every_step", 0.05),
            f"max_norm=0.05 clips every step, the median one to 0.051 times its norm. {ALIKE} If that is "
            "meant, as in PPO, keep it. To clip unusual batches alone, use about max_norm=1.4. Large "
            "gradients then count more.",
        ),
        (
            (calm(), lambda step: 0.9 + 0.1 * (step % 2), "clips_every_step", 1.4),
            "The threshold (0.9 to 1) clips 55% of the steps, the median one to 0.81 times its norm. So it "
            "shortens most steps, not only those of unusual batches. To clip unusual batches alone, use "
            "about max_norm=1.4.",
        ),
        (
            (exploding(), 0.1, "clips_every_step", 0.1),
            f"max_norm=0.1 clips every step, the median one to 0.0013 times its norm. {ALIKE} If that is "
            "meant, as in PPO, keep it. If the run failed when the norms left their range, lower the "
            "learning rate.",
        ),
        (
            (exploding(), 10.0, "too_high", 0.99),
            "max_norm=10 did not keep the norms in their range. Use max_norm=0.99, the median of the 360 "
            "steps before. If the norms leave that range again, lower the learning rate.",
        ),
        (
            (exploding(), 0.97, "unknown", 0.99),
            "max_norm=0.97 did not keep the norms in their range, and the steps before suggest no lower one "
            "(0.99): lower the learning rate.",
        ),
        ((calm(20), 1.0, "unknown", None), f"Whether max_norm=1 is right cannot be told. {AT_LEAST_FIFTY}"),
    ],
)
def test_the_verdict_comes_first(case: tuple[Array, Threshold, str, float | None], reason: str) -> None:
    norms, max_norm, verdict, use = case
    advice = run_of(norms, max_norm).suggest()
    assert (advice.verdict, advice.max_norm, advice.reason) == (verdict, use, reason)
    assert words(advice).startswith(reason)


def test_another_threshold_is_judged_by_the_norms_of_a_run() -> None:
    history = run_of(calm(), 0.05)
    assert history.suggest(max_norm=1.6).reason == run_of(calm(), 1.6).suggest().reason
    assert history.suggest(max_norm=0.05).reason == history.suggest().reason
    assert run_of(calm()).suggest(max_norm=100).verdict == "never_clips"
    with pytest.raises(ValueError, match="`max_norm` must be at least 0, got -1"):
        history.suggest(max_norm=-1)


def test_skipped_steps_do_not_hide_the_threshold() -> None:
    history = History()
    for step, norm in enumerate(calm().tolist()):
        skipped = step % 10 == 0
        max_norm, coefficient = (math.inf, 1.0) if skipped else (1.6, min(1.0, 1.6 / norm))
        history.append(step, norm, max_norm, coefficient, skipped)
    assert history.suggest().reason.startswith("Keep max_norm=1.6: it clips 45 of 1,000 steps")


def trained(max_norm: object, norms: Array, **options: Any) -> Advice:
    """The advice after steps with these norms."""
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    clipper = Clipper(optimizer, max_norm, **options)  # type: ignore[arg-type]
    for norm in norms.tolist():
        for weight in weights:
            weight.grad = torch.full((1,), norm / math.sqrt(2))
        optimizer.step()
    return clipper.history.suggest()


def test_learned_thresholds_are_judged_by_what_they_did() -> None:
    """A ZScore of a small deviation clips much more than spikes, which it is for."""
    norms = calm(400)
    assert trained(ZScore(), norms).verdict == "keep"
    advice = trained(ZScore(threshold=0.1), norms)
    assert advice.verdict == "clips_every_step"
    assert "of the steps, the median one to" in advice.reason
    assert "So it shortens most steps, not only those of unusual batches." in advice.reason
    assert trained(Percentile(10), norms).verdict == "clips_every_step"


def test_a_threshold_for_each_parameter_is_not_compared_with_a_number_for_all() -> None:
    advice = trained(0.3, calm(400), scope="parameter")
    assert advice.verdict == "clips_every_step"
    assert "half and twice" not in advice.reason


@pytest.mark.parametrize(("max_norm", "verdict"), [(0.5, "in_the_way"), (1.6, "keep")])
def test_a_threshold_is_in_the_way_only_if_a_higher_one_would_help(max_norm: float, verdict: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(100))
    optimizer = torch.optim.Adam([weight], eps=1.0)  # above all gradients, clipped or not
    clipper = Clipper(optimizer, max_norm)
    for norm in calm(100).tolist():
        weight.grad = torch.full((100,), norm / 10)
        optimizer.step()
    advice = clipper.history.suggest()
    assert advice.verdict == verdict
    remedy = (
        "Use max_norm=1.6, or lower eps below 0.05." if max_norm == 0.5 else "Raise max_norm, or lower eps"
    )
    assert f"below the optimizer's eps=1, so these steps change hardly anything. {remedy}" in words(advice)


def test_there_is_no_verdict_where_nothing_clips() -> None:
    assert run_of(calm()).suggest().verdict is None
    assert History().suggest().verdict is None
