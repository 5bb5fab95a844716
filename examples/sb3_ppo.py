"""Stable-Baselines3: after install() its algorithms clip with torchclip.

pip install '.[sb3]'
python examples/sb3_ppo.py

To get a report on your own script without changing it: torchclip run SCRIPT.
"""

from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

import torchclip

torchclip.install()


def reward() -> Any:
    env: Any = model.get_env()
    return evaluate_policy(model, env, n_eval_episodes=5, deterministic=False)[0]


model = PPO("MlpPolicy", "CartPole-v1", n_steps=256, learning_rate=1e-3, seed=2, device="cpu")
print(f"mean reward untrained: {reward():.0f}")
model.learn(5_000)
print(f"mean reward trained: {reward():.0f}")
