"""What advice sees in synthetic histories of each kind, over many seeds, and how often it is wrong."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from runs import advice_on, calm, words

from torchclip import Clipper
from torchclip.history import History
from torchclip.reference import Array

SEEDS = 20


def falling(seed: int, steps: int) -> Array:
    """Losses of a run that learns."""
    noise = np.random.default_rng(1000 + seed).lognormal(sigma=0.1, size=steps)
    return 4 * np.exp(-2 * np.arange(steps) / steps) * noise


def noisy(seed: int, steps: int) -> Array:
    """Losses of a run that does not learn."""
    return np.random.default_rng(2000 + seed).lognormal(sigma=0.5, size=steps)


@pytest.mark.parametrize("losses", [None, falling, noisy])
@pytest.mark.parametrize(("steps", "spread"), [(60, 0.3), (200, 0.8), (300, 0.5)])
def test_wrong_alarms_on_stationary_norms_are_below_2_percent(
    steps: int, spread: float, losses: Callable[[int, int], Array] | None
) -> None:
    found = [
        advice_on(calm(steps, seed, spread), None if losses is None else losses(seed, steps))
        for seed in range(100)
    ]
    for alarms in (
        sum(advice.drifts for advice in found),
        sum(advice.spikes > 0 for advice in found),
        sum(advice.explodes is not None for advice in found),
    ):
        assert alarms < 2
    assert all(0.5 < advice.max_norm < 10 for advice in found if advice.max_norm and advice.explodes is None)


# Explosions


@pytest.mark.parametrize(
    ("at", "steps", "ratio"),
    [(1, 300, 1e6), (5, 300, 1e4), (100, 300, 30.0), (270, 300, 1e6), (980, 1000, 1e6)],
)
def test_norms_that_leave_their_range_at_once(at: int, steps: int, ratio: float) -> None:
    for seed in range(SEEDS):
        norms = calm(steps, seed)
        norms[at:] *= ratio
        advice = advice_on(norms)
        assert advice.explodes == at
        assert advice.max_norm is not None
        assert advice.max_norm < 2
        assert words(advice).startswith(f"At step {at} the norms left their usual range for good")


@pytest.mark.parametrize(("start", "steps", "rate"), [(20, 300, 1.2), (500, 1000, 1.05), (900, 1000, 1.2)])
def test_norms_that_grow_step_by_step(start: int, steps: int, rate: float) -> None:
    for seed in range(SEEDS):
        norms = calm(steps, seed)
        norms[start:] *= rate ** np.arange(steps - start)
        advice = advice_on(norms)
        assert advice.explodes is not None
        assert start <= advice.explodes <= start + math.log(100) / math.log(rate)
        assert advice.max_norm is not None
        assert advice.max_norm < 2


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("at", [3, 100, 285])
def test_norms_that_are_not_finite_any_more(at: int, value: float) -> None:
    norms = calm(300, 0)
    norms[at:] = value
    advice = advice_on(norms)
    assert (advice.explodes, advice.nonfinite) == (at, 300 - at)
    assert words(advice).startswith(
        f"Not finite: the norm of {300 - at} steps of 300, after the norms had left their usual range."
    )
    assert "before, and most are not finite since then." in words(advice)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("at", [3, 100, 285])
def test_losses_that_are_not_finite_any_more(at: int, value: float) -> None:
    """Norms alone hardly show it.  NumPy's quantile between infinite losses is `nan`, with a warning."""
    for seed in range(SEEDS):
        norms, losses = calm(300, seed, 0.1), falling(seed, 300)
        norms[at:] *= 2.5
        losses[at:] = value
        explodes = advice_on(norms, losses).explodes
        assert explodes is not None
        assert at - 3 <= explodes <= at  # the loss of a step before may be higher than usual, too


def test_the_loss_shows_where_an_explosion_begins_after_one_step() -> None:
    """As in an RNN at a learning rate of 5: the loss shows the explosion, the norms hardly do."""
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        norms = np.concatenate([[0.91], 3 * rng.lognormal(sigma=0.6, size=249)])
        losses = np.concatenate([[4.7, 5.0, 6.0, 12.0, 30.0], 10 * rng.lognormal(sigma=0.2, size=245)])
        advice = advice_on(norms, losses)
        assert advice.explodes in (1, 2, 3)
        assert advice.max_norm is not None
        assert 0.2 < advice.max_norm < 1.5
        assert "The loss rose from" in words(advice)
    assert advice_on(norms).explodes is None


@pytest.mark.parametrize("steps", [160, 640])
def test_a_loss_that_changes_with_the_data_shows_no_explosion(steps: int) -> None:
    """As in PPO: each rollout of 40 steps has a loss of its own, and the norms grow slowly."""
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        levels = np.repeat(rng.uniform(40, 75, size=steps // 40), 40)
        levels[:40] = 35
        norms = np.minimum(15 * np.sqrt(levels / 40) * (1 + np.arange(steps) / 160), 60)
        noise = rng.lognormal(sigma=0.08, size=(2, steps))
        assert advice_on(norms * noise[0], levels * noise[1]).explodes is None


@pytest.mark.parametrize("ends_with", ["norm", "loss"])
def test_a_run_that_ends_after_a_few_steps_because_it_explodes(ends_with: str) -> None:
    """As in a Transformer with SGD at a learning rate of 5."""
    norms = [1.4, 4.1, 16.4, 60.9, 808.0, 13867.0, 2.3e15]
    losses = [4.97, 4.91, 37.1, 44.0, 1944.6, 207788.0, 1.4e8]
    if ends_with == "norm":
        norms[-1] = math.nan
    else:
        losses[-1] = math.nan
    advice = advice_on(norms, losses)
    assert advice.explodes == 2
    assert advice.max_norm is not None
    assert 0.3 < advice.max_norm < 2
    assert "No threshold helps" not in str(advice)
    assert advice_on(norms[:-1], losses[:-1]).max_norm is None  # it may still come down


def test_a_jump_that_may_be_meant_is_said_as_it_was_seen() -> None:
    norms = calm(400, 0)
    norms[200:] *= 40
    advice = advice_on(norms, falling(0, 400))
    assert advice.explodes == 200
    assert "left their usual range for good" in words(advice)
    assert "The loss did not rise" in words(advice)
    assert "explo" not in words(advice)
    assert advice.max_norm is not None
    assert 20 < advice.max_norm < 200


# Neither drift nor spikes nor an explosion


@pytest.mark.parametrize("kind", ["in turn", "at random", "in blocks"])
def test_two_levels_that_alternate(kind: str) -> None:
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        levels = {
            "in turn": np.tile([1.0, 20.0], 250),
            "at random": rng.choice([1.0, 20.0], 500),
            "in blocks": np.tile(np.repeat([1.0, 20.0], 10), 25),
        }[kind]
        advice = advice_on(levels * calm(500, seed, 0.1))
        assert (advice.drifts, advice.spikes, advice.explodes) == (False, 0, None)


def test_norms_that_were_0_before_have_no_usual_range() -> None:
    norms = [0.0, 3.0, 0.3, 3.0, 3.0, 0.3, 12.0, 9.0, 3.0, 11.0, 4.0, 16.0]
    advice = advice_on(norms, [0.04] + [0.8] * 11)
    assert (advice.explodes, advice.max_norm) == (None, None)
    assert advice.reason.startswith("Too early")


def test_steps_that_are_not_finite_are_said_first() -> None:
    norms = calm(400, 0)
    norms[np.random.default_rng(0).permutation(400)[:200]] = math.nan
    advice = advice_on(norms)
    assert advice.explodes is None
    assert str(advice).startswith("Not finite: the norm of 200 steps of 400.")


def test_a_run_that_converges_is_not_told_to_stand_still() -> None:
    model = torch.nn.Linear(10, 1, dtype=torch.float64)
    inputs = torch.randn(64, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def trained(max_norm: float) -> tuple[float, History]:
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        clipper = Clipper(optimizer, max_norm)
        for _ in range(200):
            optimizer.zero_grad()
            loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
            loss.backward()
            clipper.loss = loss
            optimizer.step()
        return loss.item(), clipper.history

    loss, history = trained(math.inf)
    advice = history.suggest()
    assert loss < 1e-12
    assert advice.drifts
    assert str(advice).startswith("The norms drift")
    assert advice.max_norm is not None
    assert trained(advice.max_norm)[0] < 1e-8


def test_a_step_with_several_closure_calls_counts_once() -> None:
    history = History()
    for step, norm in enumerate(calm(100, 0)):
        for call in range(4):
            history.append(step, norm * 10**-call, math.inf, 1.0)
    assert history.suggest().steps == 90
    assert history.suggest() == advice_on(calm(100, 0))


# Losses beside norms


def test_spikes_that_did_no_harm_are_named_as_such() -> None:
    norms, losses = calm(400, 0), falling(0, 400)
    norms[150] *= 40
    assert "They did no harm: the loss did not rise after it." in words(advice_on(norms, losses))
    norms[250] *= 40
    assert "They did no harm: the loss did not rise after any of them." in words(advice_on(norms, losses))
    losses[151:170] *= 5
    assert "The loss rose after 1 of them" in words(advice_on(norms, losses))


def test_a_spike_after_which_the_norms_leave_their_range_did_harm() -> None:
    norms, losses = calm(150, 0), falling(0, 150)
    norms[80] *= 1000
    norms[81:] *= 10
    losses[81:] = 40.0
    advice = advice_on(norms, losses)
    assert advice.explodes == 81
    assert advice.spikes == 1
    assert "The loss rose after 1 of them" in words(advice)


def test_of_a_spike_in_the_last_step_it_is_not_known_whether_it_did_harm() -> None:
    norms, losses = calm(200, 0), falling(0, 200)
    norms[[100, 199]] *= 40
    text = words(advice_on(norms, losses))
    assert "The last step is one of them" in text
    assert "no harm" not in text


# Gradients below eps


def trained(
    optimizers: list[torch.optim.Optimizer], norms: Sequence[float], max_norm: Any, **options: Any
) -> History:
    """A hundred steps, in each of which the parameters have gradients of these norms."""
    clipper = Clipper(optimizers, max_norm, **options)
    parameters = [p for each in optimizers for group in each.param_groups for p in group["params"]]
    for _ in range(100):
        for parameter, norm in zip(parameters, norms, strict=True):
            parameter.grad = torch.full_like(parameter, norm / math.sqrt(parameter.numel()))
        for optimizer in optimizers:
            optimizer.step()
    return clipper.history


def weight(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(shape))


@pytest.mark.parametrize("max_norm", [1e-6, 1.0])
def test_stalls(max_norm: float) -> None:
    history = trained([torch.optim.Adam([weight(100, 100)], eps=1e-6)], [10.0], max_norm)
    stalled = max_norm < 1e-4
    assert history.suggest().stalls == float(stalled)
    advice = history.suggest()
    assert ("root mean square of about 1e-08, below the optimizer's eps=1e-06" in words(advice)) == stalled
    assert (advice.verdict == "in_the_way") == stalled
    assert ("Use max_norm=20, or lower eps below 1e-08." in words(advice)) == stalled


@pytest.mark.parametrize("options", [{}, {"scope": "group"}, {"scope": "parameter"}])
def test_a_small_group_that_stalls_beside_a_large_one_is_found(options: dict[str, Any]) -> None:
    groups: list[dict[str, Any]] = [
        {"params": [weight(100, 100)]},
        {"params": [weight(4)], "eps": 1e-5},
    ]
    history = trained([torch.optim.Adam(groups, eps=1e-8)], [100.0, 1e-3], 0.5e-5, **options)
    assert history.suggest().stalls == 1.0
    assert "of group 1 of Adam have a root mean square" in words(history.suggest())
    assert "eps=1e-05" in words(history.suggest())
    groups = [{"params": [weight(100, 100)]}, {"params": [weight(4)]}]
    assert trained([torch.optim.Adam(groups)], [100.0, 1e-3], 0.1, **options).suggest().stalls == 0.0


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="since torch 2.9")
def test_muon_stalls_by_the_norm_of_a_matrix() -> None:
    muon = torch.optim.Muon([("first", weight(30, 30)), ("second", weight(30, 30))])
    history = trained([muon, torch.optim.AdamW([weight(50)])], [1.0, 1e-3, 10.0], 1e-4)
    assert history.suggest().stalls == 1.0
    assert "of second of Muon have a norm of about 1e-08, below the optimizer's eps=1e-07" in words(
        history.suggest()
    )
    muon = torch.optim.Muon([weight(30, 30), weight(30, 30)])  # whose root mean square would be below eps
    assert trained([muon, torch.optim.AdamW([weight(50)])], [1.0, 1.0, 10.0], 2e-6).suggest().stalls == 0.0


def test_stalls_follow_a_threshold_that_changes_from_step_to_step() -> None:
    history = trained(
        [torch.optim.Adam([weight(100)], eps=1e-6)], [10.0], lambda step: 1e-6 if step % 4 else 1.0
    )
    assert history.suggest().stalls == 0.75


def test_a_group_without_a_gradient_beside_one_that_is_not_finite_is_no_stall() -> None:
    first, second = weight(2), weight(2)
    optimizer = torch.optim.Adam([{"params": [first]}, {"params": [second]}])
    clipper = Clipper(optimizer, float("inf"))
    for step in range(12):
        first.grad = torch.full((2,), math.inf if step == 9 else 1.0)
        second.grad = torch.zeros(2)
        optimizer.step()
    assert clipper.history.suggest().stalls == 0.0


@pytest.mark.usefixtures("everywhere")
def test_a_group_that_never_has_a_gradient_does_not_stall() -> None:
    first = weight(100)
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": [weight(2)], "eps": 1e-5}]
    optimizer = torch.optim.Adam(groups, eps=1e-6)
    clipper = Clipper(optimizer, 1e-6)
    for _ in range(12):
        first.grad = torch.ones(100)
        optimizer.step()
    assert (
        "Stalled: in 100% of the steps the clipped gradients of group 0 of Adam have a root mean square"
        in words(clipper.history.suggest())
    )


def test_without_an_eps_nothing_stalls() -> None:
    assert trained([torch.optim.SGD([weight(100)], lr=0.1)], [10.0], 1e-9).suggest().stalls == 0.0
    assert History().suggest().stalls == 0.0
    bare = History()
    for step in range(100):
        bare.append(step, 10.0, 1e-9, 1e-10)
    assert bare.suggest().stalls == 0.0
