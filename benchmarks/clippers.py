"""What a Clipper adds to a training step, in every configuration: how many times less than other code.

    python benchmarks/clippers.py [--rounds 400] [--only TEXT]

Each Clipper is compared with torch's ``clip_grad_norm_`` for a list of the parameters, or, where it does what
torch has no function for, with a plain loop.  Muon and AdamW are compared with
``clip_grad_norm_(model.parameters(), …)``, as nobody has a list of what both train.  The title of a table
says whether anything is clipped.

Everything runs in one process on one thread.  Each round is a backward pass and a step for every contender of
a table, in a random order, on the same parameters.  Each contender has optimizers of its own, which share
their state.  Only the part after the backward pass is timed.  A row shows the lower quartile minus that of a
step without clipping.  The last two rows of a table show what cannot be told from nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from time import perf_counter
from typing import Any

import torch
from steps import BATCH, MODELS, TITLES, new_model
from torch import Tensor, nn
from turns import one_thread, options_of, print_machine, quartiles, take_turns

import torchclip
from torchclip.cli.options import count

WARM_UP = 100  # steps: longer than the warm-up of any threshold
NOTHING, AGAIN, NO_HOOKS = "no clipping", "no clipping again", "hooks that do nothing"
Parameters = Iterable[nn.Parameter]
ByHand = Callable[[Parameters], object]
Optimizers = list[torch.optim.Optimizer]
Make = Callable[[Optimizers], torchclip.Clipper]


# By hand


def above(parameters: Parameters) -> None:
    """torch's function, with a threshold that is never reached."""
    nn.utils.clip_grad_norm_(parameters, 1e6)


def by_norm(parameters: Parameters) -> None:
    """torch's function."""
    nn.utils.clip_grad_norm_(parameters, 1e-3)


def by_value(parameters: Parameters) -> None:
    """torch's function."""
    nn.utils.clip_grad_value_(parameters, 1e-3)


def each_by_norm(parameters: Parameters) -> None:
    """A loop over torch's function."""
    for parameter in parameters:
        nn.utils.clip_grad_norm_(parameter, 1e-3)


@torch.no_grad()
def by_mean_square(parameters: Parameters) -> None:
    """A plain loop."""
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.mul_((1e-4 / parameter.grad.square().mean().sqrt()).clamp(max=1.0))


@torch.no_grad()
def adaptively(parameters: Parameters) -> None:
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


# Clippers


def clipper(max_norm: Any, **options: Any) -> Make:
    """Makes a Clipper on the only optimizer."""
    return lambda optimizers: torchclip.Clipper(optimizers[0], max_norm, **options)


def logs(record: Any) -> None:
    """What a logger reads."""
    float(record.total_norm), record.step, record.clipped


CONFIGURATIONS: dict[str, Callable[[], Make]] = {
    "a number": lambda: clipper(1e6),
    'nonfinite="skip"': lambda: clipper(1e6, nonfinite="skip"),
    'nonfinite="error"': lambda: clipper(1e6, nonfinite="error"),
    'norm_type="inf"': lambda: clipper(1e6, norm_type="inf"),
    'scope="group"': lambda: clipper(1e6, scope="group"),
    "layers_every=100": lambda: clipper(1e6, layers_every=100),
    'scope="parameter"': lambda: clipper(1e6, scope="parameter"),
    "a schedule": lambda: clipper(lambda step: 1e6 + step),
    "on_clip=a function": lambda: clipper(1e6, on_clip=logs),
    "skip_above=RollingSigma()": lambda: clipper(1e6, skip_above=torchclip.RollingSigma()),
}
"""Those that clip nothing, by what they are called in the tables."""

THRESHOLDS: dict[str, tuple[ByHand, Callable[[], Make]]] = {
    "1e-3": (by_norm, lambda: clipper(1e-3)),
    "ZScore()": (by_norm, lambda: clipper(torchclip.ZScore())),
    "Percentile()": (by_norm, lambda: clipper(torchclip.Percentile())),
    "Percentile(window=100)": (by_norm, lambda: clipper(torchclip.Percentile(window=100))),
    "RollingSigma()": (by_norm, lambda: clipper(torchclip.RollingSigma())),
    "Value(1e-3)": (by_value, lambda: clipper(torchclip.Value(1e-3))),
    "BlockRMS(1e-4)": (by_mean_square, lambda: clipper(torchclip.BlockRMS(1e-4))),
    "Adaptive()": (adaptively, lambda: clipper(torchclip.Adaptive())),
    '1e-3, scope="parameter"': (each_by_norm, lambda: clipper(1e-3, scope="parameter")),
    'Percentile(), scope="parameter"': (
        each_by_norm,
        lambda: clipper(torchclip.Percentile(), scope="parameter"),
    ),
    'AdaGC(), scope="parameter"': (each_by_norm, lambda: clipper(torchclip.AdaGC(), scope="parameter")),
}
"""Those that clip, or learn to, each with the code by hand that does the same or the next to it."""


# Trainings


def sgd(parameters: Parameters) -> Optimizers:
    """One optimizer."""
    return [torch.optim.SGD(parameters, lr=1e-6)]


def muon_and_adamw(parameters: Parameters) -> Optimizers:
    """Muon for the matrices, AdamW for the rest."""
    matrices, others = ([p for p in parameters if (p.ndim == 2) == two] for two in (True, False))
    return [torch.optim.Muon(matrices, lr=1e-6), torch.optim.AdamW(others, lr=1e-6)]


class Contender:
    """Optimizers, what clips before they step, and the Clipper on them, if there is one."""

    def __init__(
        self, optimizers: Optimizers, by_hand: ByHand | None = None, make: Make | None = None
    ) -> None:
        self.optimizers, self.by_hand = optimizers, by_hand
        self.clipper = None if make is None else make(optimizers)


class Training:
    """A model, and contenders that train it in turns.

    Code by hand gets ``model.parameters()`` if ``walks``, otherwise a list.
    """

    def __init__(self, name: str, walks: bool) -> None:
        torch.manual_seed(0)
        self.model, self.inputs = new_model(name), torch.randn(BATCH, MODELS[name][0])
        self.parameters, self.walks = list(self.model.parameters()), walks

    def turn(self, contender: Contender) -> float:
        """The seconds that clipping and the steps take after a backward pass."""
        for optimizer in contender.optimizers:
            optimizer.zero_grad()
        self.model(self.inputs).square().mean().backward()
        by_hand, optimizers = contender.by_hand, contender.optimizers
        start = perf_counter()
        if by_hand is not None:
            by_hand(self.model.parameters() if self.walks else self.parameters)
        for optimizer in optimizers:
            optimizer.step()
        return perf_counter() - start

    def measure(self, contenders: dict[str, Contender], rounds: int) -> dict[str, float]:
        """The microseconds that each contender adds to a step: lower quartiles."""
        turns = {name: partial(self.turn, contender) for name, contender in contenders.items()}
        take_turns(turns, WARM_UP)
        times = take_turns(turns, rounds)
        check_that_they_clipped(contenders, WARM_UP + rounds)
        quartile = {name: 1e6 * quartiles(taken)[0] for name, taken in times.items()}
        return {name: value - quartile[NOTHING] for name, value in quartile.items()}


def check_that_they_clipped(contenders: dict[str, Contender], steps: int) -> None:
    """Raise if a Clipper has not recorded every step, or has skipped one: what it costs would be wrong."""
    for name, contender in contenders.items():
        if contender.clipper is not None:
            summary = contender.clipper.history.summary()
            if (summary.steps, summary.skipped) != (steps, 0):
                raise RuntimeError(f"{name} recorded {summary}; it should be {steps} steps, none skipped")


def floors(optimizers_of: Callable[[], Optimizers]) -> dict[str, Contender]:
    """What adds nothing: twice no clipping, and hooks in C that do nothing."""
    found = {name: Contender(optimizers_of()) for name in (NOTHING, AGAIN, NO_HOOKS)}
    for optimizer in found[NO_HOOKS].optimizers:
        nothing: Any = memoryview(b"").__exit__  # a function in C that takes three arguments
        optimizer.register_step_pre_hook(nothing)
        optimizer.register_step_post_hook(nothing)
    return found


# Tables

Rows = dict[str, tuple[ByHand, Make]]


def table(
    title: str, model: str, optimizers_of: Callable[[Parameters], Optimizers], rows: Rows, rounds: int
) -> None:
    """Measure and print one table."""
    training = Training(model, walks=optimizers_of is muon_and_adamw)
    first = optimizers_of(training.parameters)

    def new() -> Optimizers:
        optimizers = optimizers_of(training.parameters)
        for optimizer, of_first in zip(optimizers, first, strict=True):
            optimizer.state = of_first.state
        return optimizers

    contenders = floors(new)
    contenders |= {by_hand.__name__: Contender(new(), by_hand) for by_hand, _ in rows.values()}
    contenders |= {name: Contender(new(), make=make) for name, (_, make) in rows.items()}
    found = training.measure(contenders, rounds)
    print(f"\n{TITLES[model]}, {title}\n\n| a Clipper with | added, µs | by hand, µs | times less |")
    print("|---|---:|---:|---:|")
    for name, (by_hand, _) in rows.items():
        own, other = found[name], found[by_hand.__name__]
        print(f"| `{name}` | {own:.1f} | {other:.1f} | {other / own:.1f} |")
    for name in (AGAIN, NO_HOOKS):
        print(f"| {name} | {found[name]:.1f} | | |", flush=True)


def tables(model: str, only: str, rounds: int) -> None:
    """All tables for a model."""

    def chosen(rows: Rows) -> Rows:
        return {name: row for name, row in rows.items() if only in name}

    unclipped = chosen({name: (above, make()) for name, make in CONFIGURATIONS.items()})
    clipped = chosen({name: (by_hand, make()) for name, (by_hand, make) in THRESHOLDS.items()})
    joint = chosen(
        {
            "[muon, adamw], 1e6": (above, lambda optimizers: torchclip.Clipper(optimizers, 1e6)),
            "[muon, adamw], 1e-3": (by_norm, lambda optimizers: torchclip.Clipper(optimizers, 1e-3)),
        }
    )
    for title, optimizers_of, rows in (
        ("SGD, nothing is clipped, compared with clip_grad_norm_", sgd, unclipped),
        ("SGD, clipping, compared with code by hand", sgd, clipped),
        ("Muon and AdamW, compared with clip_grad_norm_", muon_and_adamw, joint),
    ):
        if rows:
            table(title, model, optimizers_of, rows, rounds)


def main() -> None:
    """Measure and print."""
    parser = options_of(__doc__)
    parser.add_argument("--rounds", type=count, default=400, metavar="N", help="steps each (default: 400)")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains this text")
    parser.add_argument("--model", choices=MODELS, help="one of the models (default: all)")
    arguments = parser.parse_args()
    print_machine()
    with one_thread():
        for model in [arguments.model] if arguments.model else MODELS:
            tables(model, arguments.only, arguments.rounds)


if __name__ == "__main__":
    main()
