"""The other rules, compared with plain loops, timm and Opacus: rows of ``torchclip bench``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from statistics import quantiles
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

import torchclip
from torchclip import kernel
from torchclip.cli.bench.loop import without_garbage_collection
from torchclip.cli.bench.timing import progress

__all__ = ["MODELS", "PLAIN", "RULES", "SECONDS", "RuleRow", "measure_rules"]

PLAIN = "plain loop"
SECONDS = 0.6  # for each row
LEAST = 5  # rounds

Shapes = list[tuple[int, ...]]
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


class Setup:
    """Parameters with gradients that every call clips, and gradients of single examples."""

    def __init__(self, shapes: Shapes, examples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        self.originals = [torch.randn(shape, generator=generator) for shape in shapes]
        self.examples = [torch.randn((examples, *shape), generator=generator) for shape in shapes]
        for parameter, original in zip(self.parameters, self.originals, strict=True):
            parameter.grad = original.clone()

    def restore(self) -> None:
        """Undo what the last call did."""
        for parameter, original in zip(self.parameters, self.originals, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(original)


def _unit_norm(tensor: Tensor) -> Tensor:
    norm: Tensor
    if tensor.dim() < 2:
        norm = vector_norm(tensor)
    else:
        norm = vector_norm(tensor, dim=tuple(range(1, tensor.dim())), keepdim=True)
    return norm


@torch.no_grad()
def _plain_adaptive(setup: Setup) -> None:
    for parameter in setup.parameters:
        assert parameter.grad is not None
        limit = _unit_norm(parameter).clamp_(min=EPS).mul_(CLIP_FACTOR)
        norm = _unit_norm(parameter.grad)
        parameter.grad.mul_(torch.where(norm > limit, limit / norm.clamp(min=1e-6), 1.0))


@torch.no_grad()
def _plain_per_example(setup: Setup) -> list[Tensor]:
    norms = torch.stack([vector_norm(grad.flatten(1), dim=1) for grad in setup.examples]).norm(dim=0)
    clip_coefs = (1.0 / (norms + 1e-6)).clamp(max=1.0)
    return [torch.einsum("i,i...->...", clip_coefs, grad) for grad in setup.examples]


@torch.no_grad()
def _plain_rms(setup: Setup) -> None:
    for parameter in setup.parameters:
        assert parameter.grad is not None
        rms = vector_norm(parameter.grad) / parameter.grad.numel() ** 0.5
        parameter.grad.mul_((LIMIT / rms).clamp(max=1.0))


@torch.no_grad()
def _plain_per_parameter(setup: Setup) -> None:
    for parameter in setup.parameters:
        assert parameter.grad is not None
        parameter.grad.mul_((LIMIT / (vector_norm(parameter.grad) + 1e-6)).clamp(max=1.0))


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

    def clip(setup: Setup) -> None:
        # Made once; its step() would add noise, which is not measured here.
        optimizer = vars(setup).get("opacus")
        if optimizer is None:
            sgd = torch.optim.SGD(setup.parameters, lr=0.1)
            optimizer = optimizer_type(sgd, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1)
            vars(setup)["opacus"] = optimizer
        for parameter, grads in zip(setup.parameters, setup.examples, strict=True):
            vars(grads).pop("_processed", None)  # it refuses gradients that it has clipped before
            parameter.grad_sample, parameter.summed_grad = grads, None  # type: ignore[attr-defined]
        optimizer.clip_and_accumulate()

    return clip


RULES: dict[str, tuple[str, Call, Call, tuple[str, Callable[[], Call | None]] | None]] = {
    "AGC": (
        "clip_grad_adaptive_",
        _plain_adaptive,
        lambda setup: torchclip.clip_grad_adaptive_(setup.parameters, CLIP_FACTOR, EPS),
        ("timm", _timm),
    ),
    "per example": (
        "clip_per_example",
        _plain_per_example,
        lambda setup: torchclip.clip_per_example(setup.examples, 1.0),
        ("Opacus", _opacus),
    ),
    "RMS": (
        "clip_grad_rms_",
        _plain_rms,
        lambda setup: torchclip.clip_grad_rms_(setup.parameters, LIMIT),
        None,
    ),
    "per parameter": (
        "clip_grad_norm_per_parameter_",
        _plain_per_parameter,
        lambda setup: torchclip.clip_grad_norm_per_parameter_(setup.parameters, LIMIT),
        None,
    ),
}
"""Each rule's function, the plain loop, the call of torchclip, and another library with the rule."""


def measure_rules(seconds: float = SECONDS, models: Sequence[str] = tuple(MODELS)) -> list[RuleRow]:
    """The seconds of each rule on each model, and how many times faster than the plain loop that is.

    All contenders take turns, on one thread, and clip the same gradients each time.

    Args:
        seconds: how long each row is measured.
        models: which of ``MODELS``.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: list[RuleRow] = []
    try:
        with progress(len(models) * len(RULES)) as begin:
            for model in models:
                setup = Setup(*MODELS[model])
                for rule in RULES:
                    begin(f"{rule}, {model}")
                    times = _times(setup, rule, seconds)
                    found.append({"rule": rule, "model": model, **_summary(times)})
    finally:
        torch.set_num_threads(threads)
    return found


def _contenders(rule: str) -> dict[str, Call]:
    _, plain, ours, other = RULES[rule]
    calls: dict[str, Call] = {PLAIN: plain}
    rival = other[1]() if other else None
    if other and rival:
        calls[other[0]] = rival
    if kernel.status().startswith("active"):
        calls["kernel off"] = ours
    calls["torchclip"] = ours
    return calls


def _times(setup: Setup, rule: str, seconds: float) -> dict[str, list[float]]:
    calls = _contenders(rule)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name in calls:
        _turn(setup, name, calls[name])  # one-time work is not measured
    end = perf_counter() + seconds
    with without_garbage_collection():
        while perf_counter() < end or len(times[PLAIN]) < LEAST:
            for name, call in calls.items():
                times[name].append(_turn(setup, name, call))
    return times


def _turn(setup: Setup, name: str, call: Call) -> float:
    setup.restore()
    with kernel.disabled() if name == "kernel off" else nullcontext():
        start = perf_counter()
        call(setup)
        return perf_counter() - start


def _summary(times: Mapping[str, Sequence[float]]) -> RuleRow:
    quartiles = {name: quantiles(of_one, n=4) for name, of_one in times.items()}
    loop = quartiles[PLAIN][0]
    speedup = {name: loop / of_one[0] for name, of_one in quartiles.items() if name != PLAIN}
    return {"seconds": quartiles, "speedup": speedup}
