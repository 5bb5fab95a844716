"""The command ``torchclip bench``: how long clipping takes on this machine, with torch and with torchclip.

Each model is a module with the gradients of a real backward pass.  Contenders take turns, in random order, so
that a disturbance affects all of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import torchclip
from torchclip.cli import info
from torchclip.cli.options import file_to_write, refusal

__all__ = ["add_arguments", "run"]

NAMES = ("torch", "torchclip", "Clipper")
MOST_DOUBT = 0.25
EXPLANATION = f"""
A call is timed in a loop; clipping and a step of SGD right after a backward pass, on one thread.
In brackets: how many times less than torch.  (?): two halves of the measurement differ by more than
{MOST_DOUBT:.0%}, as other programs used the processor; measure again on an idle machine."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    names = ", ".join(MODELS)
    add("--only", metavar="MODEL", action="append", choices=MODELS, help=f"may be repeated: {names}")
    where = "where the models are, such as cuda or cuda:1 (default: %(default)s)"
    add("--device", metavar="DEVICE", type=_device, default="cpu", help=where)
    add("--json", metavar="FILE", type=file_to_write, help="write the results as JSON")


def run(options: argparse.Namespace) -> None:
    """Measure each model, and print its rows of the table."""
    facts = info.facts() | {"models on": _name_of(options.device)}
    print("\n".join(f"{name:<18} {value}" for name, value in facts.items()), end="\n\n")
    print(_columns("medians in µs", NAMES))
    measures: dict[str, Callable[[Setup], dict[str, Any]]] = {
        "one call, within the limit": partial(calls, clips=False),
        "one call, clipping": partial(calls, clips=True),
        "added to a step, clipping": steps,
    }
    rows: list[dict[str, Any]] = []
    for name in options.only or MODELS:
        setup = Setup(name, options.device)
        for what, measure in measures.items():
            row = {"model": MODELS[name].title, "what": what, **measure(setup)}
            print(_columns(f"{row['model']}, {what}", [_cell(row, each) for each in NAMES]), flush=True)
            rows.append(row)
    print(EXPLANATION)
    if options.json:
        text = json.dumps({"machine": facts, "rows": rows}, indent=1)
        try:
            options.json.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise refusal(f"argument --json: {error.strerror}: {options.json}") from None


# The models


Turn: TypeAlias = Callable[[], float]
"""Takes a turn, and returns the seconds that it took."""


class Model(NamedTuple):
    """A model with its inputs, and how many turns each contender has."""

    title: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    rounds: int = 40


def _mlp(widths: Sequence[int]) -> nn.Module:
    return nn.Sequential(*(layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.Tanh())))


class _Transformer(nn.Module):
    """A language model of GPT-2's layers, whose output layer is the embedding."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(1024, width)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.layers(self.embedding(tokens) + self.position.weight[: tokens.shape[1]])
        return hidden @ self.embedding.weight.T


def _tokens(vocabulary: int, length: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(vocabulary, (1, length))


MODELS = {
    "mlp": Model("MLP 17-64-64-6", lambda: _mlp([17, 64, 64, 6]), lambda: torch.randn(64, 17)),
    "deep": Model("24 layers of 32", lambda: _mlp([32] * 25), lambda: torch.randn(64, 32)),
    "transformer": Model("Transformer 4×128", lambda: _Transformer(256, 128, 4), _tokens(256, 64)),
    "gpt2": Model("GPT-2 small", lambda: _Transformer(50257, 768, 12), _tokens(50257, 8), rounds=6),
}


class Setup:
    """A model with gradients, on a device."""

    def __init__(self, name: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self.rounds = MODELS[name].rounds
        self.model = MODELS[name].make().to(device)
        self.inputs = MODELS[name].inputs().to(device)
        self.parameters = list(self.model.parameters())
        self.backward()
        self.norm = float(torchclip.clip_grad_norm_(self.parameters, math.inf))

    def backward(self) -> None:
        """The part of a training step before clipping."""
        self.model.zero_grad()
        self.model(self.inputs).square().mean().backward()


# Measuring


def calls(setup: Setup, clips: bool) -> dict[str, Any]:
    """A call by itself, warm, on all threads: gradients are within the limit, or clipped by every call."""
    kept = [None if p.grad is None else p.grad.clone() for p in setup.parameters]
    factor = 0.99 if clips else 1.0  # below what the call before has clipped to, so that each call clips

    def restored() -> Iterator[float]:
        for parameter, grad in zip(setup.parameters, kept, strict=True):
            parameter.grad = None if grad is None else grad.clone()
        first = setup.norm * (factor if clips else 10)
        return (first * factor**i for i in itertools.count())

    def turn(function: Callable[..., object]) -> Turn:
        names = {"clip": function, "parameters": setup.parameters, "restored": restored}
        threads = torch.get_num_threads()
        timer = Timer(
            "clip(parameters, next(limit))", "limit = restored()", globals=names, num_threads=threads
        )
        number = min(max(int(1e-3 / timer.timeit(1).median), 1), 100)
        return lambda: timer.timeit(number).median

    functions = {"torch": nn.utils.clip_grad_norm_, "torchclip": torchclip.clip_grad_norm_}
    return compared({name: turn(function) for name, function in functions.items()}, setup.rounds)


def steps(setup: Setup) -> dict[str, Any]:
    """What clipping adds to a step of SGD right after a backward pass, on one thread."""
    optimizer, clipped = (torch.optim.SGD(setup.parameters, lr=1e-9) for _ in range(2))
    limit = setup.norm / 2
    clipper = torchclip.Clipper(clipped, limit)

    def turn(step: Callable[[], object], clip: Callable[..., object] | None = None) -> Turn:
        names = {"setup": setup, "model": setup.model, "limit": limit, "clip": clip, "step": step}
        statement = "step()" if clip is None else "clip(model.parameters(), limit); step()"
        timer = Timer(statement, "setup.backward()", globals=names, num_threads=1)
        return lambda: timer.timeit(1).median

    turns = {
        "torch": turn(optimizer.step, nn.utils.clip_grad_norm_),
        "torchclip": turn(optimizer.step, torchclip.clip_grad_norm_),
        "Clipper": turn(clipped.step),
    }
    found = compared(turns, setup.rounds, floor=turn(optimizer.step))
    clipper.detach()
    return found


def compared(turns: Mapping[str, Turn], rounds: int, floor: Turn | None = None) -> dict[str, Any]:
    """The median seconds of each contender, how many times less than torch's that is, and if this is certain.

    Args:
        turns: what each contender's turn takes, by name.
        rounds: how many turns each has, at least 2.
        floor: what a turn takes without clipping, which is subtracted.
    """
    everyone = {**turns, "floor": floor or (lambda: 0.0)}
    times: dict[str, list[float]] = {name: [] for name in everyone}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample([*everyone], len(everyone)):
            times[name].append(everyone[name]())

    def ratios(part: slice) -> dict[str, float]:
        seconds = medians(part)
        return {name: seconds["torch"] / (own or math.inf) for name, own in seconds.items()}

    def medians(part: slice) -> dict[str, float]:
        return {name: median(times[name][part]) - median(times["floor"][part]) for name in turns}

    ratio, first, second = (ratios(slice(start, None, step)) for start, step in ((0, 1), (0, 2), (1, 2)))
    doubt = {name: abs(first[name] - second[name]) for name in turns}
    certain = {name: doubt[name] <= MOST_DOUBT * ratio[name] for name in turns}
    return {"seconds": medians(slice(None)), "times_less": ratio, "certain": certain}


# Showing


def _columns(title: str, cells: Sequence[str]) -> str:
    return f"{title:<46}{cells[0]:>10}{cells[1]:>18}{cells[2]:>18}".rstrip()


def _cell(row: Mapping[str, Any], name: str) -> str:
    if name not in row["seconds"]:
        return ""
    time = f"{1e6 * row['seconds'][name]:,.1f}"
    if name == "torch":
        return time
    return f"{time} ({row['times_less'][name]:.1f}×)" if row["certain"][name] else f"{time} (?)"


def _name_of(device: torch.device) -> str:
    return f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def _device(text: str) -> torch.device:
    """A device of this machine."""
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here ({reason})") from None
    if device.type == "meta":
        raise argparse.ArgumentTypeError("nothing is computed on the device 'meta'; choose cpu or cuda")
    return device
