"""What ``torchclip train`` shows: a table that is live during the training, samples, and the picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path

from rich.box import SIMPLE
from rich.console import RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from torch import Tensor

from torchclip.cli.figures import save
from torchclip.cli.options import writing
from torchclip.cli.terminal import Console, tell_file
from torchclip.cli.thresholds import LEARNED
from torchclip.cli.train.figure import training_figure
from torchclip.cli.train.options import Options
from torchclip.cli.train.parallel import Way, world_size
from torchclip.cli.train.training import OPTIMIZERS, Run
from torchclip.history.page import page as html_page

PROGRESS_WIDTH = 15
RECENT = 20  # the number of steps in the mean loss that is shown, as single losses are noisy
SAMPLE_LINES = 6
WAYS = {"fsdp": "FSDP2", "ddp": "DDP"}

WIDE = 72  # the width from which each run has a row
NUMBERS = ("loss", "perplexity", "gradient norm", "largest norm", "clipped steps")


def introduction(
    console: Console, options: Options, text: Path | None, tokens: Tensor, vocabulary: str, way: Way | None
) -> None:
    """Say which model is trained, and on which text."""
    source = "Python's own documentation" if text is None else str(text)
    cell = {"rnn": "Tanh RNN", "lstm": "LSTM", "transformer": "Transformer"}[options.cell]
    optimizer = OPTIMIZERS[options.cell].__name__
    warmup = f" after {options.warmup} steps of warm-up" if options.warmup > 1 else ""
    spread = "" if way is None else f", on {world_size()} processes with {WAYS[way]}"
    console.print(
        f"{cell} with {options.hidden} hidden units, learning to predict the next character of {source} "
        f"({len(tokens):,} characters, {len(vocabulary)} different). "
        f"{options.steps} steps of {optimizer}, learning rate {options.lr:g}{warmup}, on "
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


def live_table(console: Console, runs: Sequence[Run], options: Options) -> Live:
    """A context in which the terminal shows the progress of the runs; it is cleared afterwards."""

    def progress(run: Run) -> ProgressBar:
        return ProgressBar(options.steps, len(run.history), width=PROGRESS_WIDTH)

    def now() -> Table:
        return _table(console, runs, progress)

    return Live(get_renderable=now, console=console, refresh_per_second=8, transient=True)


def interruption(console: Console, runs: Sequence[Run], options: Options) -> None:
    """Say that the training was interrupted."""
    steps = max(len(run.history) for run in runs)
    console.print(
        f"Interrupted after step {steps} of {options.steps}. The tables below cover the steps so far.",
        style="bold",
        highlight=False,
    )


def closing_table(console: Console, runs: Sequence[Run], options: Options, vocabulary: str) -> None:
    """Print the results of the runs."""

    def ended(run: Run) -> Text:
        if run.diverged:
            return Text(f"diverged at {len(run.history)}", style="bold red")
        return Text(f"{len(run.history)} of {options.steps}")

    console.print(_table(console, runs, ended))
    console.print(
        f"Loss and perplexity are means over the last {RECENT} steps (random guessing has a perplexity of "
        f"{len(vocabulary)}). Norms are those of all gradients together, before clipping.",
        style="dim",
        highlight=False,
    )


def _table(console: Console, runs: Sequence[Run], progress: Callable[[Run], RenderableType]) -> Table:
    """A row for each run, or in a narrow terminal a column."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    headers = ["run", "step", *NUMBERS]
    rows = [[run.name, progress(run), *_numbers(run)] for run in runs]
    if console.width >= WIDE:
        table.add_column(headers[0], vertical="bottom")
        table.add_column(headers[1], vertical="bottom", min_width=PROGRESS_WIDTH)
        for header in NUMBERS:
            table.add_column(header.replace(" ", "\n"), justify="right", vertical="bottom")
        for row in rows:
            table.add_row(*row)
    else:
        table.add_column("")
        for run in runs:
            table.add_column(run.name, justify="right")
        for cells in zip_longest(headers[1:], *(row[1:] for row in rows), fillvalue=""):
            table.add_row(*cells)
    return table


def _numbers(run: Run) -> list[str]:
    records = list(run.history)
    if not records:
        return []
    recent = run.losses[-RECENT:]
    loss = sum(recent) / len(recent)
    norms = [record.total_norm for record in records]
    clipped = sum(record.clipped for record in records) / len(records)
    numbers = (loss, perplexity(loss), norms[-1], max(norms))
    return [*(f"{number:.3g}" for number in numbers), f"{clipped:.0%}" if run.name == "clipped" else "–"]


def perplexity(loss: float) -> float:
    """The number of equally likely characters that would be as hard to predict."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def samples(console: Console, runs: Sequence[Run], texts: Sequence[str | None]) -> None:
    """Print the first lines that each model writes, skipping blank ones."""
    for run, text in zip(runs, texts, strict=True):
        if text is None:
            body = Text("Nothing: its scores are not finite.", style="italic")
        elif text.isspace():
            body = Text("Only white space.", style="italic")
        else:
            lines = [line for line in text.splitlines() if line.strip()]
            body = Text("\n".join(lines[:SAMPLE_LINES]))
        console.print(Panel(body, title=f"written by the {run.name} model", title_align="left"))


def plot(console: Console, runs: Sequence[Run], path: Path, options: Options) -> None:
    """Write the picture of the runs."""
    note = "the smallest of all parameters" if options.threshold == "adagc" else "follows the norms"
    figure = training_figure({run.name: run.history.as_dict() for run in runs}, note)
    save(figure, path)
    tell_file(console, "Picture", path)


def page(console: Console, runs: Sequence[Run], path: Path) -> None:
    """Write a page about the norms of the runs."""
    html = html_page("torchclip train", {run.name: run.history._shown() for run in runs})
    with writing(path):
        path.write_text(html, encoding="utf-8")
    tell_file(console, "Page", path)


def saved(console: Console, path: Path) -> None:
    """Say where the model is, and how to load it."""
    tell_file(console, "Model", path, " (torchclip.cli.train.model.load_model reads it)")
