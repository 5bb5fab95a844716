"""A recurrent language model that learns because its gradients are clipped.

This file shows how to add clipping to a training loop: it is one line in ``train``.  The rest is a plain
character-level language model on real text, trained by truncated backpropagation through time.  A recurrent
network reads some 64 characters and predicts the next character after each.  The gradient flows back through
all of these steps.  Each step multiplies it by the recurrent weights, which makes it explode.

``torchclip train`` trains two models, one with clipping and one without, from the same weights and on the
same batches.  Several processes that ``torchrun`` started train them together
(``torchclip.cli.train.parallel``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchclip
from torchclip.cli.options import refusal
from torchclip.cli.thresholds import max_norm_of
from torchclip.cli.train import parallel
from torchclip.cli.train.model import detached, new_model
from torchclip.cli.train.options import Options
from torchclip.history.history import History
from torchclip.thresholds.base import MaxNorm

# The text


def read_text(path: Path | None) -> str:
    """The text of a file; without one, Python's documentation of itself, topic after topic."""
    if path is not None:
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise refusal(f"--text {path} is not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise refusal(
            "this Python lacks its documentation (pydoc_data): pass a text with --text FILE"
        ) from None
    return "\n".join(topics[name] for name in sorted(topics))


def encode(text: str, vocabulary: str) -> Tensor:
    """Each character's position in the vocabulary: int64, of shape ``(characters,)``."""
    position = {character: i for i, character in enumerate(vocabulary)}
    return torch.tensor([position[character] for character in text])


def batches(tokens: Tensor, options: Options) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of text, and the same windows one character later, which the model predicts.

    The text is cut into ``batch`` streams of equal length, which are read in parallel.  Each window begins
    where the last one ended, so that the network can keep its state; at the end of the text, reading starts
    again.  With several processes, each reads its share of the streams.

    Args:
        tokens: the encoded text, int64, of shape ``(characters,)``.
        options: only ``batch``, ``bptt`` and ``steps`` are used.

    Yields:
        ``steps`` pairs of inputs and targets, each of shape ``(batch, bptt)``, or fewer rows in a share.
    """
    length = len(tokens) // options.batch
    streams = parallel.share(tokens[: options.batch * length].view(options.batch, length))
    for step in range(options.steps):
        start = step * options.bptt % (length - options.bptt)
        stop = start + options.bptt
        yield streams[:, start:stop], streams[:, start + 1 : stop + 1]


# Training

OPTIMIZERS = {"rnn": torch.optim.SGD, "lstm": torch.optim.SGD, "transformer": torch.optim.AdamW}
LAYERS_EVERY = 10  # how often the norm of each parameter is recorded, for the page of --html


@dataclass
class Run:
    """A model in training, with a record of each step so far."""

    name: str
    model: nn.Module
    max_norm: MaxNorm
    history: History

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [record.loss for record in self.history if record.loss is not None]

    @property
    def diverged(self) -> bool:
        """Whether the last loss is not finite."""
        loss = self.history[-1].loss if self.history else None
        return loss is not None and not math.isfinite(loss)


def train(run: Run, tokens: Tensor, options: Options) -> Iterator[None]:
    """Train the run's model in place, one step for each ``next()``, and record the steps in its history.

    An infinite ``max_norm`` measures the gradients without clipping them.  Training ends at a loss that is
    not finite, after which the model cannot learn.
    """
    optimizer = OPTIMIZERS[options.cell](run.model.parameters(), lr=options.lr)
    # Clipping is this line: every optimizer.step() now clips the gradients before it uses them.
    clipper = torchclip.Clipper(optimizer, run.max_norm, model=run.model, layers_every=LAYERS_EVERY)
    clipper.history = run.history
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / options.warmup))
    state = None
    for inputs, targets in batches(tokens, options):
        scores, state = run.model(inputs, detached(state))
        loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        clipper.loss = parallel.mean(loss)
        optimizer.step()
        schedule.step()
        yield
        if run.diverged:
            return


def start_runs(
    only: str | None, vocabulary: str, options: Options, way: parallel.Way | None = None
) -> list[Run]:
    """The runs to compare, without and with clipping, from the same weights, in one process or several."""
    max_norms = {"unclipped": math.inf, "clipped": max_norm_of(options.threshold, options.max_norm)}
    runs = []
    for name in [only] if only else max_norms:
        torch.manual_seed(options.seed)
        model = parallel.parallelize(new_model(options.cell, len(vocabulary), options.hidden), way)
        runs.append(Run(name, model, max_norms[name], History(max(options.steps, 1))))
    return runs


def advance(runs: list[Run], tokens: Tensor, options: Options) -> bool:
    """Train all runs, step by step, until they end or Ctrl-C; returns whether it was Ctrl-C."""
    trainings = [train(run, tokens, options) for run in runs]
    with parallel.CtrlC() as ctrl_c:
        for _ in zip_longest(*trainings):
            if ctrl_c.on_any_rank():
                return True
    return False
