"""What ``torchclip run --try`` shows: a verdict, a table, a picture and a page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from torchclip.cli.run.files import now, write_files
from torchclip.cli.run.report import filled
from torchclip.cli.run.tries import AS_IT_IS, Command, Tries, Try
from torchclip.cli.run.verdict import compared, judged, verdict
from torchclip.history.figure import losses_figure
from torchclip.history.history import History
from torchclip.history.signs import final_loss


def compare(options: argparse.Namespace) -> int:
    """Run as it is and with each threshold, or search for one, and show the results; returns the status."""
    script = ["-m"] * options.module + [options.script, *options.args]
    command = Command(script, options.metric, options.maximize, options.seeds or 1)
    tries = Tries(command)
    tries.all_of([AS_IT_IS])
    if options.tries != ["auto"]:
        tries.all_of(options.tries)
    elif not tries.signal:
        tries.auto()
    found, said = [each for each in tries.done if each.runs], verdict(tries, command)
    rows, about_thresholds = _rows(found, command), judged(found)
    print(_table(rows))
    for run in (run for each in found for run in each.runs):
        if run.error:
            print(f"\n{run.threshold}, its last lines:\n{run.error}")
    print("\n" + "\n".join(map(filled, [said, *about_thresholds])), flush=True)
    histories = _histories(found)

    def html() -> str:
        from torchclip.history.page import page

        about = [*about_thresholds, f"{' '.join(script)}, {now()}"]
        losses = losses_figure(_curves(found))
        return page("Thresholds tried", histories, {"": about}, (rows, losses), said)

    status = write_files(options, histories, lambda: losses_figure(_curves(found)), html)
    return tries.status if tries.signal else status or tries.status


def _rows(tries: Sequence[Try], command: Command) -> list[list[str]]:
    """The table: a heading, and a row for each threshold, which starts with the threshold as given."""
    labels = list(dict.fromkeys(label for each in tries for run in each.runs for label in run.losses))
    if command.metric is not None or len(labels) < 2:
        labels = [""]
    numbers = [f"{command.what} at the end" + (f" of {label}" if label else "") for label in labels]
    found = [["threshold", *numbers, "vs. as it is", "largest norm", "clipped", "time"]]
    for each in tries:
        summaries = [history.summary() for run in each.runs for history in run.histories.values()]
        norms = [summary.largest_norm for summary in summaries if summary.largest_step is not None]
        clipped, steps = sum(s.clipped for s in summaries), sum(s.steps for s in summaries)
        than = "" if each is tries[0] or labels != [""] else compared(each, tries[0], command.maximize)
        found.append(
            [
                each.threshold,
                *(_result(each, label) for label in labels),
                than,
                f"{max(norms):.4g}" if norms else "",
                f"{clipped / max(steps, 1):.1%}" if summaries else "",
                f"{sum(run.seconds for run in each.runs):.3g} s",
            ]
        )
    return found


def _result(tried: Try, label: str) -> str:
    """The mean and the range of the runs' numbers, or what went wrong."""
    problem = next((run.problem for run in tried.runs if run.problem), "")
    if problem:
        return problem
    found = [run.score if not label else final_loss(run.losses.get(label, [])) for run in tried.runs]
    mean = f"{np.mean(found):.4g}"
    return mean if len(found) == 1 else f"{mean} ({min(found):.4g} to {max(found):.4g})"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _curves(tries: Sequence[Try]) -> dict[str, list[float]]:
    """The losses of the first run with each threshold."""
    return {
        each.threshold if len(each.runs[0].losses) == 1 else f"{each.threshold}, {label}": losses
        for each in tries
        for label, losses in each.runs[0].losses.items()
    }


def _histories(tries: Sequence[Try]) -> dict[str, History]:
    """The steps of all runs, by threshold, seed and optimizer."""
    found = {}
    for run in (run for each in tries for run in each.runs):
        name = f"{run.threshold}, seed + {run.seed}" if run.seed else run.threshold
        for label, history in run.histories.items():
            found[name if len(run.histories) == 1 else f"{name}, {label}"] = history
    return found
