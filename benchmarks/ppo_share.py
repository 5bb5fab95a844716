"""How much of a PPO update clipping takes, with torch's function and with torchclip's.

    pip install 'torchclip[sb3]'
    python benchmarks/ppo_share.py

It runs Stable-Baselines3's PPO with its defaults on CartPole, on one thread: one rollout of 2,048 steps, then
the same update (320 steps of the optimizer) again and again from the same weights, alternating between
torch's function and torchclip's.  Both run under the same timer.  It prints medians over the updates.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from stable_baselines3 import PPO

import torchclip
from torchclip import kernel


class Timed:
    """A function that adds up the time it takes."""

    def __init__(self, function: Callable[..., object]) -> None:
        self.function = function
        self.seconds = 0.0
        self.calls = 0

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Call it."""
        start = time.perf_counter()
        result = self.function(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return result


def update(model: PPO, before: dict[str, Any], clip: Callable[..., object]) -> tuple[float, float, int]:
    """One update from the same state: its seconds, the seconds of clipping, and how often it clipped."""
    model.set_parameters(copy.deepcopy(before))
    torch.manual_seed(0)
    timed = Timed(clip)
    utils: Any = torch.nn.utils
    utils.clip_grad_norm_ = timed
    start = time.perf_counter()
    model.train()
    return time.perf_counter() - start, timed.seconds, timed.calls


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=15, help="updates with each function (default: 15)")
    options = parser.parse_args()

    torch.set_num_threads(1)
    functions = {"torch": torch.nn.utils.clip_grad_norm_, "torchclip": torchclip.clip_grad_norm_}
    model = PPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu")
    model.learn(model.n_steps)
    before = copy.deepcopy(model.get_parameters())
    for clip in functions.values():
        update(model, before, clip)
    runs: dict[str, list[tuple[float, float, int]]] = {name: [] for name in functions}
    for _ in range(options.updates):
        for name, clip in functions.items():
            runs[name].append(update(model, before, clip))

    print(f"torch {torch.__version__}, one thread, kernel: {kernel.status()}")
    for name, of_function in runs.items():
        whole = statistics.median(run[0] for run in of_function)
        share = statistics.median(run[1] / run[0] for run in of_function)
        each = statistics.median(run[1] / run[2] for run in of_function)
        print(f"{name:<10} update {whole:.3f} s, clipping {share:.1%} of it ({each * 1e6:.1f} µs a call)")


if __name__ == "__main__":
    main()
