"""A recurrent language model that learns because its gradients are clipped: the command ``torchclip train``.

Read from top to bottom, this file shows how clipping goes into a training: it is one line in ``train``.
The rest is a plain character-level language model on real text, trained by truncated backpropagation through
time: a recurrent network reads some 64 characters, predicts the successor of each, and the gradient flows
back through all of these steps.  At each of them it is multiplied by the recurrent weights, and that is where
it explodes.

The command trains two models, from the same weights and on the same batches: one with clipping, one without.
It works on one thread, unless ``OMP_NUM_THREADS`` says otherwise: that is enough for a small model, and its
numbers do not depend on how many cores a machine has.  Started by ``torchrun``, several processes train them
together, for which ``torchclip.cli.train.parallel`` is there.

A model stored with ``--save`` is loaded and used like this:

    from torchclip.cli.train.train import load_model, sample

    model, vocabulary = load_model("model.pt")
    print(sample(model, vocabulary, length=500, seed=1))
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchclip
from torchclip.cli.main import file_to_write, png_file
from torchclip.cli.train import parallel
from torchclip.thresholds.base import MaxNorm

# The learning rates are as high as training with clipping bears; that is what clipping is good for.
LEARNING_RATES = {"rnn": 3.0, "lstm": 30.0}
MAX_NORMS = {"rnn": 0.5, "lstm": 0.25}
THRESHOLDS = ("fixed", "percentile", "zscore")
EMBEDDING = 32


@dataclass(frozen=True)
class Options:
    """What the numbers of a run depend on, besides the text."""

    cell: str
    hidden: int
    lr: float
    warmup: int
    threshold: str
    max_norm: float
    steps: int
    batch: int
    bptt: int
    seed: int


# The text


def read_text(path: Path | None) -> str:
    """The text of a file; without one, Python's documentation of itself, topic after topic."""
    if path is not None:
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise _refusal(f"--text {path} is not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise _refusal(
            "this Python lacks its documentation (pydoc_data): pass a text with --text FILE"
        ) from None
    return "\n".join(topics[name] for name in sorted(topics))


def encode(text: str, vocabulary: str) -> Tensor:
    """Each character's position in the vocabulary: int64, of shape ``(characters,)``."""
    position = {character: i for i, character in enumerate(vocabulary)}
    return torch.tensor([position[character] for character in text])


def batches(tokens: Tensor, options: Options) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of text, and the same windows one character later, which are to be predicted.

    The text is cut into ``batch`` equally long streams, which are read side by side.  Each window begins
    where the last one ended, so that the network can carry its state on; after the end they begin anew.
    Of several processes each reads its share of the streams.

    Args:
        tokens: the encoded text, int64, of shape ``(characters,)``.
        options: of which ``batch``, ``bptt`` and ``steps`` are used.

    Yields:
        ``steps`` pairs of inputs and targets, each of shape ``(batch, bptt)``, or fewer rows in a share.
    """
    length = len(tokens) // options.batch
    streams = parallel.share(tokens[: options.batch * length].view(options.batch, length))
    for step in range(options.steps):
        start = step * options.bptt % (length - options.bptt)
        stop = start + options.bptt
        yield streams[:, start:stop], streams[:, start + 1 : stop + 1]


# The model

State: TypeAlias = Tensor | tuple[Tensor, Tensor] | None  # an LSTM's has two parts; None at the beginning
Weights: TypeAlias = dict[str, Any]  # what a module's state_dict() returns


class Model(nn.Module):
    """Characters in, a score for every possible next character out."""

    def __init__(self, cell: str, vocabulary_size: int, hidden: int) -> None:
        super().__init__()
        recurrent = {"rnn": nn.RNN, "lstm": nn.LSTM}[cell]
        self.embedding = nn.Embedding(vocabulary_size, EMBEDDING)
        self.recurrent = recurrent(EMBEDDING, hidden, batch_first=True)
        self.output = nn.Linear(hidden, vocabulary_size)

    def forward(self, tokens: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Read on from a state.

        Args:
            tokens: int64, of shape ``(batch, time)``.
            state: the one in which the last call ended.

        Returns:
            scores of shape ``(batch, time, vocabulary_size)``, and the state in which this call ended.
        """
        hidden, state = self.recurrent(self.embedding(tokens), state)
        return self.output(hidden), state


def detached(state: State) -> State:
    """The state without its past: here backpropagation through time is truncated."""
    if isinstance(state, tuple):
        return state[0].detach(), state[1].detach()
    return None if state is None else state.detach()


# Training


def max_norm_of(options: Options) -> MaxNorm:
    """The ``max_norm`` of the clipped run: a number, or an object that learns one from the norms so far."""
    if options.threshold == "percentile":
        return torchclip.Percentile(10, max_norm=options.max_norm)
    if options.threshold == "zscore":
        return torchclip.ZScore(max_norm=options.max_norm)
    return options.max_norm


class Step(NamedTuple):
    """What is kept of one training step."""

    loss: float
    norm: float  # of all gradients together, before clipping
    max_norm: float  # to which they were clipped
    clipped: bool


def train(model: nn.Module, tokens: Tensor, options: Options, max_norm: MaxNorm) -> Iterator[Step]:
    """Train the model in place, a step for each ``next()``.

    An infinite ``max_norm`` measures the gradients without clipping them.  A loss that is not finite is the
    last one: nothing can be learned after it.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr)
    # Clipping is this line: every optimizer.step() now clips the gradients before it uses them.
    clipper = torchclip.Clipper(optimizer, max_norm)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / options.warmup))
    state = None
    for inputs, targets in batches(tokens, options):
        scores, state = model(inputs, detached(state))
        loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()

        clipping = clipper.history[-1]
        step = Step(parallel.mean(loss), clipping.total_norm, clipping.max_norm, clipping.clipped)
        yield step
        if not math.isfinite(step.loss):
            return


@dataclass
class Run:
    """One model in training, with its steps so far."""

    name: str
    model: nn.Module
    max_norm: MaxNorm
    steps: list[Step] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        """Whether the last loss is not finite."""
        return bool(self.steps) and not math.isfinite(self.steps[-1].loss)


def start_runs(
    only: str | None, vocabulary: str, options: Options, way: parallel.Way | None = None
) -> list[Run]:
    """The runs to compare, without and with clipping, from the same weights, on one process or several."""
    max_norms = {"unclipped": math.inf, "clipped": max_norm_of(options)}
    runs = []
    for name in [only] if only else max_norms:
        torch.manual_seed(options.seed)
        model = parallel.parallelize(Model(options.cell, len(vocabulary), options.hidden), way)
        runs.append(Run(name, model, max_norms[name]))
    return runs


def advance(runs: list[Run], tokens: Tensor, options: Options) -> bool:
    """Train all runs beside each other, step by step, to their end or to Ctrl-C: whether that came."""
    trainings = [train(run.model, tokens, options, run.max_norm) for run in runs]
    with parallel.CtrlC() as ctrl_c:
        for steps in zip_longest(*trainings):
            for run, step in zip(runs, steps, strict=True):
                if step is not None:
                    run.steps.append(step)
            if ctrl_c.on_any_rank():
                return True
    return False


# Using the model


@torch.no_grad()
def sample(model: Model, vocabulary: str, length: int, seed: int) -> str | None:
    """Text that the model writes, or None if its scores are not finite."""
    generator = torch.Generator().manual_seed(seed)
    token = torch.zeros(1, 1, dtype=torch.int64)  # the first of the vocabulary: in most texts, the line break
    state, text = None, ""
    for _ in range(length):
        scores, state = model(token, state)
        if not scores.isfinite().all():
            return None
        token = scores[:, -1].softmax(-1).multinomial(1, generator=generator)
        text += vocabulary[int(token)]
    return text


def model_of(weights: Weights, vocabulary: str, cell: str, hidden: int) -> Model:
    """A model with these weights."""
    model = Model(cell, len(vocabulary), hidden)
    model.load_state_dict(weights)
    return model


def save_model(path: Path, weights: Weights, vocabulary: str, options: Options) -> None:
    """Store a model's weights, and what ``load_model`` needs to build it again."""
    torch.save({"model": weights, "vocabulary": vocabulary, "options": asdict(options)}, path)


def load_model(path: str | Path) -> tuple[Model, str]:
    """The model in a file that ``torchclip train --save`` wrote, and its vocabulary."""
    stored = torch.load(path, weights_only=True)
    vocabulary, options = stored["vocabulary"], stored["options"]
    return model_of(stored["model"], vocabulary, options["cell"], options["hidden"]), vocabulary


# The command


def run(
    text: Path | None,
    only: str | None,
    plot: Path | None,
    save: Path | None,
    way: parallel.Way | None,
    cell: str,
    lr: float | None,
    threshold: str,
    max_norm: float | None,
    **counts: int,
) -> int:
    """Train with and without clipping, and show the difference.

    Args:
        text: the file to learn from; by default Python's own documentation.
        only: ``"clipped"`` or ``"unclipped"`` for one run instead of both.
        plot: where the picture of loss and gradient norm goes.
        save: where the clipped (or only) model goes.
        way: how several processes train one model; by default ``"fsdp"``.
        cell: ``"rnn"`` or ``"lstm"``.
        lr: the learning rate; by default the cell's in ``LEARNING_RATES``.
        threshold: one of ``THRESHOLDS``.
        max_norm: the fixed threshold, by default the cell's in ``MAX_NORMS``, or a ceiling for the others, by
            default none.
        counts: the other ``Options``.

    Returns:
        the exit status: 0, or 130 after Ctrl-C.

    Raises:
        argparse.ArgumentError: if the text or the options cannot be used.
        OSError: if a file cannot be read or written.
    """
    from torchclip.cli.train import display  # needs rich, which the functions above do not

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    if max_norm is None:
        max_norm = MAX_NORMS[cell] if threshold == "fixed" else math.inf
    options = Options(
        cell=cell, lr=lr or LEARNING_RATES[cell], threshold=threshold, max_norm=max_norm, **counts
    )
    characters = read_text(text)
    _check_length(characters, options)
    vocabulary = "".join(sorted(set(characters)))
    tokens = encode(characters, vocabulary)

    with parallel.process_group():
        way = _checked_way(way, options)
        shows = parallel.rank() == 0
        display.console.quiet = not shows
        display.introduction(options, text, tokens, vocabulary, way)
        runs = start_runs(only, vocabulary, options, way)
        with display.live_table(runs, options):
            interrupted = advance(runs, tokens, options)
        weights = [parallel.full_state_dict(run.model) for run in runs]
    if shows:
        models = [model_of(w, vocabulary, cell, options.hidden) for w in weights]
        display.closing_table(runs, options, vocabulary)
        display.samples(runs, [sample(model, vocabulary, length=400, seed=options.seed) for model in models])
        if plot is not None:
            display.plot(runs, plot)
        if save is not None:
            save_model(save, weights[-1], vocabulary, options)
            display.saved(save)
    status = 130 if interrupted else 0
    if parallel.launched():
        parallel.leave(status)
    return status


def _check_length(characters: str, options: Options) -> None:
    needed = options.batch * (options.bptt + 1)
    if len(characters) < needed:
        raise _refusal(
            f"the text is too short: it has {len(characters):,} characters, and --batch {options.batch} with "
            f"--bptt {options.bptt} needs {needed:,}; pass a longer text or smaller numbers"
        )


def _checked_way(way: parallel.Way | None, options: Options) -> parallel.Way | None:
    """How to train on the processes that there are, or None in a process that nobody launched."""
    if not parallel.launched():
        if way is not None:
            raise _refusal(
                f"--parallel {way} needs several processes; start them with: "
                "torchrun --nproc-per-node 2 -m torchclip train"
            )
        return None
    ranks = parallel.world_size()
    if options.batch % ranks:
        raise _refusal(
            f"--batch {options.batch} cannot be shared equally by {ranks} processes; "
            f"pass a multiple of {ranks}"
        )
    return way or "fsdp"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``torchclip train``."""
    add = parser.add_argument
    rates, max_norms = _by_cell(LEARNING_RATES), _by_cell(MAX_NORMS)
    add(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to learn from (default: Python's documentation)"
    )
    add("--only", choices=["clipped", "unclipped"], help="one run instead of both")
    add("--cell", choices=["rnn", "lstm"], default="rnn", help="tanh RNN or LSTM (default: %(default)s)")
    add(
        "--threshold",
        choices=THRESHOLDS,
        default="fixed",
        help="to what gradients are clipped: to --max-norm, to the 10th percentile of the norms so far "
        "(AutoClip), or, only if they are spikes, to what is usual (ZClip) (default: %(default)s)",
    )
    add(
        "--max-norm",
        type=positive,
        metavar="X",
        help=f"the fixed threshold (default: {max_norms}); for the other two a ceiling (default: none)",
    )
    add("--lr", type=positive, metavar="X", help=f"learning rate of SGD (default: {rates})")
    add(
        "--warmup",
        type=count,
        metavar="N",
        default=1,
        help="steps in which the learning rate rises to its full height (default: %(default)s)",
    )
    add("--steps", type=count, metavar="N", default=300, help="training steps (default: %(default)s)")
    add("--hidden", type=count, metavar="N", default=128, help="hidden units (default: %(default)s)")
    add("--batch", type=count, metavar="N", default=32, help="streams of text (default: %(default)s)")
    add("--bptt", type=count, metavar="N", default=64, help="characters a step (default: %(default)s)")
    add("--seed", type=seed, metavar="N", default=0, help="same seed, same numbers (default: %(default)s)")
    add(
        "--parallel",
        dest="way",
        choices=get_args(parallel.Way),
        help="how the processes that torchrun started train one model (default: fsdp)",
    )
    add("--plot", type=png_file, metavar="FILE", help="draw loss and gradient norm into a PNG file")
    add(
        "--save",
        type=file_to_write,
        metavar="FILE",
        help="store the clipped (or only) model; torchclip.cli.train.train.load_model reads it",
    )


def _by_cell(defaults: dict[str, float]) -> str:
    return ", ".join(f"{value:g} for {cell}" for cell, value in defaults.items())


def positive(text: str) -> float:
    """An option's value that is a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text}")
    return value


def count(text: str) -> int:
    """An option's value that is a whole number above 0."""
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text}")
    return value


def seed(text: str) -> int:
    """An option's value that torch takes as a seed."""
    value = _whole(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2**63 - 1, got {text}")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        return -1  # refused as any other value below the range


def _refusal(message: str) -> argparse.ArgumentError:
    return argparse.ArgumentError(None, message)
