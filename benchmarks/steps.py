"""What clipping adds to a training step: the functions of torch and torchclip.

    python benchmarks/steps.py [--rounds 800] [--json FILE]

It is the time of clipping and ``step``, minus that of ``step`` alone.  We time clipping inside a real
training step, where caches are cold, so a call takes several times as long as in a tight loop.  All
contenders use one model and one optimizer.  Otherwise the position of a model in memory, and the previous
contender, would matter more than clipping.  ``clippers.py`` measures Clippers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from turns import one_thread, options_of, print_machine, quartiles, take_turns, write_results

import torchclip
from torchclip.cli.options import count

__all__ = ["BATCH", "MODELS", "TITLES", "StepRow", "doubt", "how", "new_model"]

WARM_UP = 30
BATCH = 64

MODELS: dict[str, list[int]] = {"mlp": [17, 64, 64, 6], "layers": [32] * 25}
"""The widths of their layers."""
TITLES = {"mlp": "MLP 17-64-64-6", "layers": "24 layers of 32"}

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-6),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, fused=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-6),
}

StepRow = dict[str, Any]


def new_model(name: str) -> nn.Sequential:
    """A model of ``MODELS``."""
    layers = [layer for sizes in pairwise(MODELS[name]) for layer in (nn.Linear(*sizes), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class Setup:
    """A model of ``MODELS``, its optimizer, and the thresholds of the contenders.

    If ``clips``, the thresholds are below the norms, so that gradients are changed.
    """

    def __init__(self, model: str, optimizer: str, clips: bool) -> None:
        torch.manual_seed(0)
        self.model = new_model(model)
        self.parameters = list(self.model.parameters())
        self.optimizer = OPTIMIZERS[optimizer](self.parameters)
        self.inputs = torch.randn(BATCH, MODELS[model][0])
        # Weights hardly change, so the norms of a first backward pass are those of all steps.
        self.backward()
        grads = [p.grad for p in self.parameters if p.grad is not None]
        limit = 1e-3 if clips else 1e3
        self.max_norm = limit * float(torchclip.get_total_norm(grads))
        self.clip_value = limit * max(float(grad.abs().max()) for grad in grads)

    def backward(self) -> None:
        """The part of a training step before clipping."""
        self.optimizer.zero_grad()
        self.model(self.inputs).square().mean().backward()


def _nothing(*_: object) -> None:
    pass


_torch, _ours = torch.nn.utils, torchclip
CONTENDERS: dict[str, Callable[[Setup], object]] = {
    "no clipping": _nothing,
    "no clipping again": _nothing,
    "torch, a list": lambda s: _torch.clip_grad_norm_(s.parameters, s.max_norm),
    "torch, model.parameters()": lambda s: _torch.clip_grad_norm_(s.model.parameters(), s.max_norm),
    "torch, by value": lambda s: _torch.clip_grad_value_(s.parameters, s.clip_value),
    "function, a list": lambda s: _ours.clip_grad_norm_(s.parameters, s.max_norm),
    "function, model.parameters()": lambda s: _ours.clip_grad_norm_(s.model.parameters(), s.max_norm),
    "function, the model": lambda s: _ours.clip_grad_norm_(s.model, s.max_norm),
    "function, by value": lambda s: _ours.clip_grad_value_(s.parameters, s.clip_value),
}
"""The function that is called between the backward pass and the step."""

_RIVALS = {
    "function, a list": "torch, a list",
    "function, model.parameters()": "torch, model.parameters()",
    "function, the model": "torch, model.parameters()",
    "function, by value": "torch, by value",
}
_FLOOR = "no clipping"


def measure_steps(rounds: int) -> Iterator[StepRow]:
    """What each contender adds to a step, in seconds, and how many times less than torch that is.

    It uses one thread.

    Args:
        rounds: how often each contender takes its turn, at least 4.
    """
    for model, optimizer, clips in product(MODELS, OPTIMIZERS, (False, True)):
        row: StepRow = {"model": model, "title": TITLES[model], "optimizer": optimizer, "clips": clips}
        with one_thread():
            setup = Setup(model, optimizer, clips)
            turns = {name: partial(_turn, setup, name) for name in CONTENDERS}
            take_turns(turns, WARM_UP)
            times = take_turns(turns, rounds)
        row["added"], row["drift"] = _added(times), _drifts(times)
        row["speedup"] = {name: row["added"][rival] / row["added"][name] for name, rival in _RIVALS.items()}
        yield row


def how(row: Mapping[str, Any]) -> str:
    """The optimizer, and whether gradients are clipped."""
    return f"{row['optimizer']}, {'clipping' if row['clips'] else 'not needed'}"


def doubt(row: Mapping[str, Any], name: str) -> float:
    """The relative error of a contender's ratio.

    A busy machine shows in two measurements of a step without clipping that differ, or in two halves of this
    measurement that differ.
    """
    seconds = max(abs(float(row["added"]["no clipping again"])), row["drift"][name])
    return float(seconds / abs(row["added"][name]))


def _turn(setup: Setup, name: str) -> float:
    clip, step = CONTENDERS[name], setup.optimizer.step
    setup.backward()
    start = perf_counter()
    clip(setup)
    step()
    return perf_counter() - start


def _added(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Seconds that each contender adds to a step: its lower quartile, minus that without clipping."""
    firsts = {name: quartiles(of_one)[0] for name, of_one in times.items()}
    return {name: first - firsts[_FLOOR] for name, first in firsts.items() if name != _FLOOR}


def _drifts(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Seconds by which the two halves of the rounds differ in what each contender adds."""
    middle = len(times[_FLOOR]) // 2
    first, second = (
        _added({name: of_one[half] for name, of_one in times.items()})
        for half in (slice(None, middle), slice(middle, None))
    )
    return {name: abs(first[name] - second[name]) for name in first}


def main() -> None:
    """Measure and print."""
    parser = options_of(__doc__)
    parser.add_argument("--rounds", type=count, default=800, metavar="N", help="steps each (default: 800)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    arguments = parser.parse_args()
    print_machine()
    rows = []
    for row in measure_steps(arguments.rounds):
        rows.append(row)
        print(f"\n{row['title']}, {how(row)}: µs added to a training step, and times less than torch adds")
        for name, seconds in row["added"].items():
            ratio = f"  {row['speedup'][name]:5.1f} (± {doubt(row, name):.0%})" if name in _RIVALS else ""
            print(f"  {name:<30}{1e6 * seconds:8.1f}{ratio}", flush=True)
    if arguments.json:
        write_results(arguments.json, rows)


if __name__ == "__main__":
    main()
