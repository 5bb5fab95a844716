"""What a learned threshold for each parameter adds to a step, compared with a number for each.

    python benchmarks/threshold_steps.py [--parameters 600] [--elements 64] [--rounds 600]

Everything runs in one process on one thread.  Each round takes one step of SGD in every way, in a random
order, each with its own parameters, whose gradients are restored before.  It prints medians over the rounds:
of a step, and of its extra time over the step with a number in the same round.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from turns import one_thread, options_of, print_machine, take_turns

import torchclip
from torchclip.cli.options import count

NUMBER = "1.0"
THRESHOLDS: dict[str, Callable[[], float | torchclip.thresholds.Threshold]] = {
    NUMBER: lambda: 1.0,
    "Percentile(10)": lambda: torchclip.Percentile(10),
    "Percentile(10, window=100)": lambda: torchclip.Percentile(10, window=100),
    "Percentile(10, window=1000)": lambda: torchclip.Percentile(10, window=1000),
    "ZScore()": torchclip.ZScore,
    "AdaGC()": torchclip.AdaGC,
    "RollingSigma()": torchclip.RollingSigma,
}
WARM_UP = 200  # steps: longer than the warm-up of any threshold


class Contender:
    """Parameters with an optimizer whose Clipper has one of the thresholds."""

    def __init__(self, name: str, shapes: list[int]) -> None:
        self.parameters = [torch.nn.Parameter(torch.zeros(size)) for size in shapes]
        self.grads = [torch.zeros(size) for size in shapes]
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-6)
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            parameter.grad = grad
        torchclip.Clipper(self.optimizer, THRESHOLDS[name](), scope="parameter")

    def step(self, grads: list[Tensor]) -> float:
        """The seconds that a step with these gradients takes."""
        torch._foreach_copy_(self.grads, grads)
        start = perf_counter()
        self.optimizer.step()
        return perf_counter() - start


def measure(parameters: int, elements: int, rounds: int) -> dict[str, list[float]]:
    """The seconds of each step, by threshold."""
    torch.manual_seed(0)
    contenders = {name: Contender(name, [elements] * parameters) for name in THRESHOLDS}
    seconds: dict[str, list[float]] = {name: [] for name in THRESHOLDS}
    for i in range(WARM_UP + rounds):
        # Norms near the number, half of them above it.
        scales = torch.empty(parameters).log_normal_(0.0, 0.5) / elements**0.5
        grads = [grad * scale for grad, scale in zip(torch.randn(parameters, elements), scales, strict=True)]
        taken = take_turns({name: partial(each.step, grads) for name, each in contenders.items()}, 1)
        if i >= WARM_UP:
            for name in THRESHOLDS:
                seconds[name] += taken[name]
    return seconds


def main() -> None:
    """Measure and print."""
    parser = options_of(__doc__)
    parser.add_argument("--parameters", type=count, default=600, metavar="N", help="how many (default: 600)")
    parser.add_argument("--elements", type=count, default=64, metavar="N", help="of each (default: 64)")
    parser.add_argument("--rounds", type=count, default=600, metavar="N", help="steps each (default: 600)")
    arguments = parser.parse_args()
    print_machine()
    with one_thread():
        seconds = measure(arguments.parameters, arguments.elements, arguments.rounds)
    print("\n| `max_norm` | a step, µs | added, µs |\n|---|---:|---:|")
    for name, taken in seconds.items():
        added = median(a - b for a, b in zip(taken, seconds[NUMBER], strict=True))
        print(f"| `{name}` | {median(taken) * 1e6:.0f} | {added * 1e6:+.0f} |")


if __name__ == "__main__":
    main()
