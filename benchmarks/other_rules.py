"""How long the other rules take, compared with plain loops and, if they are installed, timm and Opacus.

python benchmarks/other_rules.py [--json FILE]
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from contenders import Gradients
from torch import Tensor, nn
from torch.linalg import vector_norm
from turns import one_thread, options_of, print_machine, quartiles, take_turns, write_results
from workloads import Shapes, Workload

import torchclip
from torchclip import kernel

__all__ = ["MODELS", "PLAIN", "RULES", "SECONDS", "RuleRow", "measure_rules"]

PLAIN = "plain loop"
SECONDS = 0.6  # for each row
LEAST = 5  # rounds

RuleRow = dict[str, Any]


def _layers(widths: Sequence[int]) -> Shapes:
    return [shape for inputs, outputs in pairwise(widths) for shape in ((outputs, inputs), (outputs,))]


MODELS: dict[str, tuple[Shapes, int]] = {
    "MLP 17-64-64-6": (_layers([17, 64, 64, 6]), 32),
    "24 layers of 32": (_layers([32] * 25), 32),
    "12 layers of 256": (_layers([256] * 13), 8),
    "12 convolutions 64×64×3×3": ([(64, 64, 3, 3), (64,)] * 12, 8),
    "6 layers of 1,024": (_layers([1024] * 7), 4),
}
"""The shapes of the parameters, and how many examples there are."""

CLIP_FACTOR, EPS, LIMIT = 0.01, 1e-3, 1e-3


class Setup(Gradients):
    """Parameters with gradients that every call clips, and gradients of single examples."""

    def __init__(self, shapes: Shapes, examples: int) -> None:
        super().__init__(Workload("", shapes))
        generator = torch.Generator().manual_seed(0)
        self.examples = [torch.randn((examples, *shape), generator=generator) for shape in shapes]
        for parameter in self.parameters:
            nn.init.normal_(parameter, generator=generator)


def _unit_norm(tensor: Tensor) -> Tensor:
    axes = None if tensor.dim() < 2 else tuple(range(1, tensor.dim()))
    norm: Tensor = vector_norm(tensor, dim=axes, keepdim=True)
    return norm


@torch.no_grad()
def _plain_adaptive(setup: Setup) -> None:
    for parameter, grad in zip(setup.parameters, setup.tensors, strict=True):
        limit = _unit_norm(parameter).clamp_(min=EPS).mul_(CLIP_FACTOR)
        norm = _unit_norm(grad)
        grad.mul_(torch.where(norm > limit, limit / norm.clamp(min=1e-6), 1.0))


def _plain_per_example(setup: Setup) -> list[Tensor]:
    norms = torch.stack([vector_norm(grad.flatten(1), dim=1) for grad in setup.examples]).norm(dim=0)
    clip_coefs = (1.0 / (norms + 1e-6)).clamp(max=1.0)
    return [torch.einsum("i,i...->...", clip_coefs, grad) for grad in setup.examples]


def _plain_rms(setup: Setup) -> None:
    for grad in setup.tensors:
        rms = vector_norm(grad) / grad.numel() ** 0.5
        grad.mul_((LIMIT / rms).clamp(max=1.0))


def _plain_per_parameter(setup: Setup) -> None:
    for grad in setup.tensors:
        grad.mul_((LIMIT / (vector_norm(grad) + 1e-6)).clamp(max=1.0))


Call = Callable[[Setup], object]


def _timm() -> Call | None:
    try:
        clip = importlib.import_module("timm.utils.agc").adaptive_clip_grad
    except Exception:  # such as an installation without its dependencies
        return None
    return lambda setup: clip(setup.parameters, CLIP_FACTOR, EPS)


def _opacus() -> Call | None:
    try:
        optimizer_type = importlib.import_module("opacus.optimizers").DPOptimizer
    except Exception:
        return None

    @cache
    def optimizer_of(setup: Setup) -> Any:
        sgd = torch.optim.SGD(setup.parameters, lr=0.1)
        return optimizer_type(sgd, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1)

    def clip(setup: Setup) -> None:
        for parameter, grads in zip(setup.parameters, setup.examples, strict=True):
            vars(grads).pop("_processed", None)  # it refuses gradients that it has clipped before
            parameter.grad_sample, parameter.summed_grad = grads, None  # type: ignore[attr-defined]
        optimizer_of(setup).clip_and_accumulate()  # its step() would add noise, which is not measured here

    return clip


class Rule(NamedTuple):
    """A plain loop, torchclip's call, and another library that has the rule: its name, and how to find it."""

    plain: Call
    ours: Call
    other: tuple[str, Callable[[], Call | None]] | None = None


RULES = {
    "AGC": Rule(
        _plain_adaptive,
        lambda setup: torchclip.clip_grad_adaptive_(setup.parameters, CLIP_FACTOR, EPS),
        ("timm", _timm),
    ),
    "per example": Rule(
        _plain_per_example,
        lambda setup: torchclip.clip_per_example(setup.examples, 1.0),
        ("Opacus", _opacus),
    ),
    "RMS": Rule(_plain_rms, lambda setup: torchclip.clip_grad_rms_(setup.parameters, LIMIT)),
    "per parameter": Rule(
        _plain_per_parameter,
        lambda setup: torchclip.clip_grad_norm_per_parameter_(setup.parameters, LIMIT),
    ),
}


def measure_rules(model: str, seconds: float = SECONDS) -> Iterator[RuleRow]:
    """The seconds of each rule on a model, and how many times faster than the plain loop that is.

    All contenders clip the same gradients each time, on one thread.

    Args:
        model: one of ``MODELS``.
        seconds: how long each row is measured.
    """
    setup = Setup(*MODELS[model])
    for rule in RULES:
        turns = {name: partial(_turn, setup, name, call) for name, call in _contenders(rule).items()}
        with one_thread():
            take_turns(turns, 1)  # one-time work is not measured
            times = take_turns(turns, LEAST, seconds=seconds)
        found = {name: quartiles(of_one) for name, of_one in times.items()}
        speedup = {name: found[PLAIN][0] / of_one[0] for name, of_one in found.items() if name != PLAIN}
        yield {"rule": rule, "model": model, "seconds": found, "speedup": speedup}


def _contenders(name: str) -> dict[str, Call]:
    rule = RULES[name]
    calls: dict[str, Call] = {PLAIN: rule.plain}
    if rule.other and (theirs := rule.other[1]()):
        calls[rule.other[0]] = theirs
    if kernel.status().startswith("active"):
        calls["kernel off"] = rule.ours
    return {**calls, "torchclip": rule.ours}


def _turn(setup: Setup, name: str, call: Call) -> float:
    setup.restore()
    with kernel.disabled() if name == "kernel off" else nullcontext():
        start = perf_counter()
        call(setup)
        return perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = options_of(__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    arguments = parser.parse_args()
    print_machine()
    rows = []
    for model in MODELS:
        print(f"\n{model}")
        for row in measure_rules(model):
            rows.append(row)
            times = (f"{name} {1e6 * taken[0]:,.1f} µs" for name, taken in row["seconds"].items())
            print(f"  {row['rule']:<14}{', '.join(times)}", flush=True)
    if arguments.json:
        write_results(arguments.json, rows)


if __name__ == "__main__":
    main()
