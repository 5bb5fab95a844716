"""Stable-Baselines3 as it is: after install() its algorithms clip with torchclip.

pip install 'torchclip[sb3]'
python examples/sb3_ppo.py

To see what that changes, run the same without the two lines of torchclip:
torchclip run examples/sb3_ppo.py
"""

from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

import torchclip

torchclip.install()

model = PPO("MlpPolicy", "CartPole-v1", n_steps=512, learning_rate=1e-3, seed=0, device="cpu")
untrained, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=5)
model.learn(6_000)
trained, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=5)
print(f"mean reward {untrained:.0f} before, {trained:.0f} after")
