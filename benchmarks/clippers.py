"""What a Clipper adds to a training step, for each threshold and rule, compared with code written by hand.

    python benchmarks/clippers.py [--rounds 300]

Everything runs in one process on one thread.  Each round is a backward pass and a step of SGD for every
contender, in a random order, with the same model and optimizer, as their position in memory matters.  Only
the part after the backward pass is timed.  It prints lower quartiles, minus that of a step without clipping,
and how many times less a Clipper adds than the code by hand next to it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import torchclip
from torchclip.cli.bench.command import machine
from torchclip.cli.bench.loop import MODELS
from torchclip.cli.bench.rounds import quartiles, take_turns
from torchclip.cli.options import count

WARM_UP = 100  # steps: longer than the warm-up of any threshold
NOTHING = "no clipping"


def by_norm(parameters: Sequence[nn.Parameter]) -> None:
    """torch's function."""
    nn.utils.clip_grad_norm_(parameters, 1.0)


def by_value(parameters: Sequence[nn.Parameter]) -> None:
    """torch's function."""
    nn.utils.clip_grad_value_(parameters, 1e-3)


def each_by_norm(parameters: Sequence[nn.Parameter]) -> None:
    """A loop over torch's function."""
    for parameter in parameters:
        nn.utils.clip_grad_norm_(parameter, 1e-3)


@torch.no_grad()
def by_mean_square(parameters: Sequence[nn.Parameter]) -> None:
    """A plain loop."""
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.mul_((1e-4 / parameter.grad.square().mean().sqrt()).clamp(max=1.0))


@torch.no_grad()
def adaptively(parameters: Sequence[nn.Parameter]) -> None:
    """A plain loop, as in most code for adaptive gradient clipping."""
    for parameter in parameters:
        grad = parameter.grad
        assert grad is not None
        limit = 0.01 * norms_of_units(parameter).clamp(min=1e-3)
        norm = norms_of_units(grad)
        grad.copy_(torch.where(norm > limit, grad * (limit / norm.clamp(min=1e-6)), grad))


def norms_of_units(tensor: Tensor) -> Tensor:
    """The norm of each row, or of a vector."""
    norms: Tensor = tensor.norm() if tensor.dim() < 2 else tensor.norm(dim=1, keepdim=True)
    return norms


ByHand = Callable[[Sequence[nn.Parameter]], None]
CLIPPERS: dict[str, tuple[ByHand, Callable[[torch.optim.Optimizer], torchclip.Clipper]]] = {
    "1.0": (by_norm, lambda o: torchclip.Clipper(o, 1.0)),
    "ZScore()": (by_norm, lambda o: torchclip.Clipper(o, torchclip.ZScore())),
    "Percentile()": (by_norm, lambda o: torchclip.Clipper(o, torchclip.Percentile())),
    "Percentile(window=100)": (by_norm, lambda o: torchclip.Clipper(o, torchclip.Percentile(window=100))),
    "RollingSigma()": (by_norm, lambda o: torchclip.Clipper(o, torchclip.RollingSigma())),
    "Value(1e-3)": (by_value, lambda o: torchclip.Clipper(o, torchclip.Value(1e-3))),
    "BlockRMS(1e-4)": (by_mean_square, lambda o: torchclip.Clipper(o, torchclip.BlockRMS(1e-4))),
    "Adaptive()": (adaptively, lambda o: torchclip.Clipper(o, torchclip.Adaptive())),
    '1e-3, scope="parameter"': (each_by_norm, lambda o: torchclip.Clipper(o, 1e-3, scope="parameter")),
}


class Bench:
    """A model with its optimizer, and the hooks of several Clippers that take turns."""

    def __init__(self, widths: Sequence[int]) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        self.model, self.inputs = nn.Sequential(*layers[:-1]), torch.randn(64, widths[0])
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-6)
        pre_hooks: dict[int, Any] = self.optimizer._optimizer_step_pre_hooks
        self.registered = pre_hooks, self.optimizer._optimizer_step_post_hooks
        self.hooks: dict[str, list[dict[int, Any]]] = {}
        self.clippers = []
        for name, (_, make) in CLIPPERS.items():
            self.clippers.append(make(self.optimizer))
            self.hooks[name] = [dict(hooks) for hooks in self.registered]
            self.clippers[-1].detach()

    def turn(self, name: str, by_hand: ByHand | None) -> float:
        """The seconds that clipping and the step take after a backward pass."""
        self.optimizer.zero_grad()
        loss: Tensor = self.model(self.inputs).square().mean()
        torch.autograd.backward([loss])
        for hooks, own in zip(self.registered, self.hooks.get(name, ({}, {})), strict=True):
            hooks.update(own)
        start = perf_counter()
        if by_hand is not None:
            by_hand(self.parameters)
        self.optimizer.step()
        seconds = perf_counter() - start
        for hooks in self.registered:
            hooks.clear()
        return seconds


def measure(widths: Sequence[int], rounds: int) -> dict[str, float]:
    """The lower quartile of the seconds of each contender."""
    bench = Bench(widths)
    contenders: dict[str, ByHand | None] = {NOTHING: None, **dict.fromkeys(CLIPPERS)}
    contenders |= {each.__name__: each for each, _ in CLIPPERS.values()}
    turns = {name: partial(bench.turn, name, by_hand) for name, by_hand in contenders.items()}
    take_turns(turns, WARM_UP)
    return {name: quartiles(taken)[0] for name, taken in take_turns(turns, rounds).items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=count, default=300, metavar="N", help="steps each (default: 300)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("\n".join(f"{name:<18} {value}" for name, value in machine().items()))
    for model, widths in MODELS.items():
        found = measure(widths, arguments.rounds)
        print(f"\n{model}\n\n| a Clipper with | added, µs | by hand, µs | times less |\n|---|---:|---:|---:|")
        for name, (by_hand, _) in CLIPPERS.items():
            own, other = found[name] - found[NOTHING], found[by_hand.__name__] - found[NOTHING]
            print(f"| `{name}` | {1e6 * own:.1f} | {1e6 * other:.1f} | {other / own:.1f} |")


if __name__ == "__main__":
    main()
