"""Stable-Baselines3 under install()."""

from collections.abc import Callable
from typing import Any

import pytest
import stable_baselines3 as sb3
from frameworks import assert_same, counted

# The frameworks' warnings depend on their versions and on the machine.
pytestmark = pytest.mark.filterwarnings("ignore")


ALGORITHMS: dict[str, Callable[[], Any]] = {
    "PPO": lambda: sb3.PPO(
        "MlpPolicy", "CartPole-v1", n_steps=64, batch_size=32, n_epochs=2, seed=0, device="cpu"
    ),
    "A2C": lambda: sb3.A2C("MlpPolicy", "CartPole-v1", seed=0, device="cpu"),
    "DQN": lambda: sb3.DQN(
        "MlpPolicy", "CartPole-v1", learning_starts=32, max_grad_norm=0.1, seed=0, device="cpu"
    ),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_stable_baselines3_trains_as_before(algorithm: str) -> None:
    steps = 128
    plain = ALGORITHMS[algorithm]().learn(steps)
    with counted("clip_grad_norm_") as norms:
        clipped = ALGORITHMS[algorithm]().learn(steps)
    assert len(norms) >= 8
    assert any(norm > clipped.max_grad_norm for norm in norms)
    assert_same(clipped.policy.state_dict(), plain.policy.state_dict())
