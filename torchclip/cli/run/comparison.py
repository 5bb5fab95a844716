"""What ``torchclip run --try`` shows: progress, a table, a picture and a page."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from torchclip.cli.figures import Array
from torchclip.cli.run.files import Files, now
from torchclip.cli.run.tries import Command, Tries, Try, recommended
from torchclip.history.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH = 80


def compare(command: Command, thresholds: Sequence[str], wanted: Files) -> int:
    """Run with each threshold, or search for one, and show the results; returns the exit status."""
    what = "loss" if command.metric is None else "metric"
    is_search = list(thresholds) == ["auto"]
    progress = _Progress(None if is_search else len(thresholds))
    tries = Tries(command, progress)
    with progress.bar:
        if is_search:
            tries.auto()
        else:
            tries.all_of(thresholds)
    found, histories = tries.done, _histories(tries.done)
    _print_table(found, what)
    print(f"logs: {tries.directory}", flush=True)

    def html() -> str:
        from torchclip.history.page import Overview, page

        about = [f"{' '.join(command.script)}, {now()}", recommended(found, what)[1]]
        table = _rows(found, what)
        overview = Overview(table, "Loss of each run", lambda width: _losses_figure(found, width))
        shown = {name: history._shown() for name, history in histories.items()}
        return page("Thresholds tried", shown, {"": about}, overview)

    status = wanted.write(histories, lambda: _losses_figure(found), html)
    return tries.status if tries.interrupted else status or tries.status


class _Progress:
    """Shows on stderr what the runs print; without a terminal, a line for each run that has ended."""

    def __init__(self, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self._console = Console(stderr=True, highlight=False)
        self._told = 0
        self.bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(12),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self.bar.add_task("", total=total)

    def __call__(self, tries: Tries) -> None:
        """Show their progress."""
        for each in tries.done[self._told :]:
            if not self._console.is_terminal:
                result = each.problem or f"{each.score:.4g}"
                line = f"torchclip: {each.threshold}: {result}, {each.seconds:.3g} s"
                print(line, file=sys.stderr, flush=True)
        self._told = len(tries.done)
        running = ", ".join(f"{each.threshold}: {each.last_line() or '…'}" for each in tries.running)
        room = max(self._console.width - 40, 10)
        self.bar.update(self._task, completed=len(tries.done), description=running[:room])


def _rows(tries: Sequence[Try], what: str) -> list[list[str]]:
    """The table: a heading, and a row for each threshold, which starts with the threshold as given."""
    found = [["threshold", f"{what} at the end", "largest norm", "clipped", "spikes", "time"]]
    for each in tries:
        summaries = [history.summary() for history in each.histories.values()]
        norms = [summary.largest_norm for summary in summaries if summary.largest_step is not None]
        counts = ["", ""]
        if summaries:
            clipped, steps = sum(s.clipped for s in summaries), sum(s.steps for s in summaries)
            spikes = sum(history.suggest().spikes for history in each.histories.values())
            counts = [f"{clipped / max(steps, 1):.1%}", f"{spikes:,}"]
        score = each.problem or f"{each.score:.4g}"
        norm = f"{max(norms):.4g}" if norms else ""
        found.append([each.threshold, score, norm, *counts, f"{each.seconds:.3g} s"])
    return found


def _print_table(tries: Sequence[Try], what: str) -> None:
    """The table, and which threshold to use."""
    from rich.table import Table

    from torchclip.cli.terminal import console_for

    console = console_for(_WIDTH, highlight=False)
    heading, *body = _rows(tries, what)
    table = Table(box=None, pad_edge=False)
    for i, name in enumerate(heading):
        table.add_column(name, justify="right" if i else "left", no_wrap=i == 0)
    for row in body:
        table.add_row(*row)
    console.print(table)
    console.print()
    for each in tries:
        if each.error:
            console.print(f"{each.threshold}: {each.error}", markup=False, soft_wrap=True)
    console.print(recommended(tries, what)[1], markup=False)


def _histories(tries: Sequence[Try]) -> dict[str, History]:
    """The steps of all runs, by threshold and optimizer."""
    return {
        each.threshold if len(each.histories) == 1 else f"{each.threshold}, {label}": history
        for each in tries
        for label, history in each.histories.items()
    }


def _losses_figure(tries: Sequence[Try], width: float = 8.0) -> Figure:
    """The loss of every run over the steps, smoothed if there are many."""
    from matplotlib.figure import Figure

    from torchclip.history.figure import NARROW, empty_figure, label_plainly

    curves: Mapping[str, list[float]] = {each.threshold: each.losses for each in tries if each.losses}
    if not curves:
        return empty_figure("no loss was seen", width)
    figure = Figure(figsize=(width, 2 + 3 * width / 8), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    for threshold, losses in curves.items():
        axes.plot(_smooth(losses), linewidth=1.2, label=threshold)
    known = [loss for losses in curves.values() for loss in losses if math.isfinite(loss)]
    if known and min(known) > 0 and max(known) > 5 * min(known):
        axes.set_yscale("log")
        label_plainly(axes.yaxis)
    axes.set_title("Loss of each run", fontsize=16)
    figure.legend(loc="outside lower center", ncols=3 if width < NARROW else 6, title="threshold")
    return figure


def _smooth(losses: Sequence[float]) -> Array:
    """The moving mean over a fiftieth of the run; values that are not finite leave gaps."""
    values = np.where(np.isfinite(losses), losses, np.nan)
    width = max(len(values) // 50, 1)
    if np.isnan(values).any():
        return values
    head = np.cumsum(values[: width - 1]) / np.arange(1, width)
    return np.concatenate([head, np.convolve(values, np.full(width, 1 / width), "valid")])
