"""What ``torchclip train`` shows: a table that is live during the training, samples, and the picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from torch import Tensor

from torchclip.cli.options import writing
from torchclip.cli.thresholds import LEARNED
from torchclip.cli.train.figure import training_figure
from torchclip.cli.train.options import Options
from torchclip.cli.train.parallel import Way, world_size
from torchclip.cli.train.training import Run, Step

PROGRESS_WIDTH = 15
RECENT = 20  # the loss shown is the mean of so many steps, since single ones are noisy
SAMPLE_LINES = 6
WAYS = {"fsdp": "FSDP2", "ddp": "DDP"}

console = Console(width=min(Console().width, 80))


def introduction(
    options: Options, text: Path | None, tokens: Tensor, vocabulary: str, way: Way | None
) -> None:
    """Say what is going to be trained, and on what."""
    source = "Python's own documentation" if text is None else str(text)
    cell = {"rnn": "Tanh RNN", "lstm": "LSTM"}[options.cell]
    warmup = f" after {options.warmup} steps of warm-up" if options.warmup > 1 else ""
    spread = "" if way is None else f", on {world_size()} processes with {WAYS[way]}"
    console.print(
        f"{cell} with {options.hidden} hidden units, learning to predict the next character of {source} "
        f"({len(tokens):,} characters, {len(vocabulary)} different). "
        f"{options.steps} steps of SGD, learning rate {options.lr:g}{warmup}, on "
        f"{options.batch} × {options.bptt} characters each{spread}; seed {options.seed}. "
        f"{_clipping(options)}",
        highlight=False,
        markup=False,
    )


def _clipping(options: Options) -> str:
    if options.threshold == "fixed" and math.isinf(options.max_norm):
        return "Nothing is clipped: the threshold is inf."
    if options.threshold == "fixed":
        return f"Clipped to a norm of {options.max_norm:g}."
    where = f"Clipped to {LEARNED[options.threshold]}"
    return f"{where}." if math.isinf(options.max_norm) else f"{where}, never above {options.max_norm:g}."


def live_table(runs: Sequence[Run], options: Options) -> Live:
    """A context in which the terminal shows how the runs are going; nothing is left of it afterwards."""

    def now() -> Table:
        return _table(runs, lambda run: ProgressBar(options.steps, len(run.steps), width=PROGRESS_WIDTH))

    return Live(get_renderable=now, console=console, refresh_per_second=8, transient=True)


def interruption(runs: Sequence[Run], options: Options) -> None:
    """Say that the training did not come to its end."""
    steps = max(len(run.steps) for run in runs)
    console.print(
        f"Interrupted after step {steps} of {options.steps}. What follows is about the steps so far.",
        style="bold",
        highlight=False,
    )


def closing_table(runs: Sequence[Run], options: Options, vocabulary: str) -> None:
    """Print what the runs came to."""

    def ended(run: Run) -> Text:
        if run.diverged:
            return Text(f"diverged at {len(run.steps)}", style="bold red")
        return Text(f"{len(run.steps)} of {options.steps}")

    console.print(_table(runs, ended))
    console.print(
        f"Loss and perplexity are means over the last {RECENT} steps (guessing blindly has a perplexity of "
        f"{len(vocabulary)}). Norms are those of all gradients together, before clipping.",
        style="dim",
        highlight=False,
    )


def _table(runs: Sequence[Run], progress: Callable[[Run], RenderableType]) -> Table:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("run", vertical="bottom")
    table.add_column("step", vertical="bottom", min_width=PROGRESS_WIDTH)
    for header in ("loss", "perplexity", "gradient\nnorm", "largest\nnorm", "clipped\nsteps"):
        table.add_column(header, justify="right", vertical="bottom")
    for run in runs:
        table.add_row(run.name, progress(run), *_numbers(run.steps, clips=run.name == "clipped"))
    return table


def _numbers(steps: Sequence[Step], clips: bool) -> list[str]:
    if not steps:
        return []
    recent = [step.loss for step in steps[-RECENT:]]
    loss = sum(recent) / len(recent)
    norms = [step.norm for step in steps]
    clipped = sum(step.clipped for step in steps) / len(steps)
    numbers = (loss, perplexity(loss), norms[-1], max(norms))
    return [*(f"{number:.3g}" for number in numbers), f"{clipped:.0%}" if clips else "–"]


def perplexity(loss: float) -> float:
    """Among how many equally likely characters the model might as well guess."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def samples(runs: Sequence[Run], texts: Sequence[str | None]) -> None:
    """Print the first lines of what each model writes, without blank ones."""
    for run, text in zip(runs, texts, strict=True):
        if text is None:
            body = Text("Nothing: its scores are not finite.", style="italic")
        elif text.isspace():
            body = Text("Nothing but white space.", style="italic")
        else:
            lines = [line for line in text.splitlines() if line.strip()]
            body = Text("\n".join(lines[:SAMPLE_LINES]))
        console.print(Panel(body, title=f"written by the {run.name} model", title_align="left"))


def plot(runs: Sequence[Run], path: Path) -> None:
    """Write the picture of the runs."""
    figure = training_figure(
        losses={run.name: [step.loss for step in run.steps] for run in runs},
        norms={run.name: [step.norm for step in run.steps] for run in runs},
        max_norms=[step.max_norm for step in runs[-1].steps],
    )
    with writing(path):
        figure.savefig(path)
    console.print(f"Picture: {path}", markup=False, highlight=False, soft_wrap=True)


def saved(path: Path) -> None:
    """Say where the model is, and how to get it back."""
    console.print(
        f"Model: {path} (torchclip.cli.train.model.load_model reads it)",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
