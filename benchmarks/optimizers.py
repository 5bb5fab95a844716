"""What one Clipper on Muon and AdamW adds to a training step, compared with torch's function.

    python benchmarks/optimizers.py [--rounds 800]

Everything runs in one process on one thread.  Each round takes one training step in every way, in a random
order.  Clipping and both steps are timed, after a real backward pass, so caches are cold.  It prints the
lower quartile of the steps, minus that of the steps without clipping.
Two contenders are there for comparison.  A call of ``torchclip.clip_grad_norm_`` for a list of all
parameters measures and scales, and does nothing else.  Hooks in C that do nothing show what calling any
hooks costs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import quantiles
from time import perf_counter
from typing import Any

import torch
from torch import nn

import torchclip
from torchclip.cli.bench.command import machine
from torchclip.cli.bench.loop import BATCH, MODELS, WARM_UP
from torchclip.cli.bench.rounds import take_turns
from torchclip.cli.options import count

NONE, TORCH, OURS = "no clipping", "torch, model.parameters()", "Clipper([muon, adamw])"
FUNCTION = "torchclip.clip_grad_norm_, a list"
EMPTY = "hooks that do nothing"
TITLES = {"mlp": "MLP 17-64-64-6", "layers": "24 layers of 32"}


class Training:
    """A model whose matrices Muon trains, and AdamW the rest."""

    def __init__(self, name: str, clips: bool) -> None:
        torch.manual_seed(0)
        widths = MODELS[name]
        layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.Tanh())]
        self.model = nn.Sequential(*layers[:-1])
        self.parameters = parameters = list(self.model.parameters())
        self.optimizers = [
            torch.optim.Muon([p for p in parameters if p.ndim == 2], lr=1e-6),
            torch.optim.AdamW([p for p in parameters if p.ndim < 2], lr=1e-6),
        ]
        self.inputs = torch.randn(BATCH, widths[0])
        self.backward()
        grads = [p.grad for p in parameters if p.grad is not None]
        self.max_norm = (1e-3 if clips else 1e3) * float(torchclip.get_total_norm(grads))
        self.clipper = torchclip.Clipper(self.optimizers, self.max_norm)
        self._registered = [
            hooks
            for o in self.optimizers
            for hooks in (o._optimizer_step_pre_hooks, o._optimizer_step_post_hooks)
        ]
        self._kept: list[dict[int, Any]] = [dict(hooks) for hooks in self._registered]

    def backward(self) -> None:
        """The part of a training step before clipping."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.model(self.inputs).square().mean().backward()

    def put_on(self, contender: str) -> None:
        """Put a contender's hooks on the optimizers, or remove them, outside the timed part."""
        nothing: dict[int, Any] = {0: memoryview(b"").__exit__}  # a function in C that takes three arguments
        for hooks, kept in zip(self._registered, self._kept, strict=True):
            hooks.clear()
            put: dict[int, Any] = {OURS: kept, EMPTY: nothing}.get(contender, {})
            hooks.update(put)

    def step(self, clip: Callable[[], object] | None) -> float:
        """The seconds that clipping and both steps take."""
        self.backward()
        start = perf_counter()
        if clip is not None:
            clip()
        for optimizer in self.optimizers:
            optimizer.step()
        return perf_counter() - start


def measure(name: str, clips: bool, rounds: int) -> dict[str, list[float]]:
    """The seconds of each step, by what clips."""
    training = Training(name, clips)

    def by_torch() -> None:
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), training.max_norm)

    def by_function() -> None:
        torchclip.clip_grad_norm_(training.parameters, training.max_norm)

    contenders: dict[str, Callable[[], object] | None] = {
        NONE: None,
        NONE + " once more": None,
        TORCH: by_torch,
        FUNCTION: by_function,
        OURS: None,
        EMPTY: None,
    }

    def turn(contender: str) -> float:
        training.put_on(contender)
        return training.step(contenders[contender])

    turns = {contender: partial(turn, contender) for contender in contenders}
    take_turns(turns, WARM_UP)
    return take_turns(turns, rounds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=count, default=800, metavar="N", help="steps each (default: 800)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("\n".join(f"{name:<18} {value}" for name, value in machine().items()))
    print(
        "\n| model | clips | torch adds, µs | Clipper adds, µs | times less | function adds, µs | times less "
        "| empty hooks, µs | doubt, µs |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, title in TITLES.items():
        for clips in (False, True):
            quartile = {key: quantiles(taken, n=4)[0] for key, taken in measure(name, clips, rounds).items()}
            theirs, ours, function, empty, doubt = (
                (quartile[key] - quartile[NONE]) * 1e6
                for key in (TORCH, OURS, FUNCTION, EMPTY, NONE + " once more")
            )
            times = f"{theirs:.0f} | {ours:.1f} | {theirs / ours:.1f}"
            others = f"{function:.1f} | {theirs / function:.1f} | {empty:.1f} | {abs(doubt):.1f}"
            print(f"| {title} | {'yes' if clips else 'no'} | {times} | {others} |", flush=True)


if __name__ == "__main__":
    main()
