"""The files that ``torchclip run`` writes: a picture, a table, a page."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from torchclip.history.history import History
from torchclip.history.records import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_files(
    options: argparse.Namespace,
    histories: Mapping[str, History],
    figure: Callable[[], Figure],
    page: Callable[[], str],
) -> int:
    """Write those that are asked for; returns 0, or 2 if one could not be written, with a message on stderr.

    Args:
        options: with the paths, or None, as ``plot``, ``csv`` and ``html``.
        histories: the steps, by optimizer.
        figure: makes the picture.
        page: makes the page.
    """
    writers: dict[str, Callable[[Path], object]] = {
        "plot": lambda path: figure().savefig(path),
        "csv": lambda path: _write_csv(path, histories),
        "html": lambda path: path.write_text(page(), encoding="utf-8"),
    }
    status = 0
    for name, write in writers.items():
        path = getattr(options, name)
        if path is None:
            continue
        try:
            write(path)
        except OSError as error:
            print(f"torchclip run: error: argument --{name}: {error.strerror}: {path}", file=sys.stderr)
            status = 2
        else:
            print(f"{name}: {path}", file=sys.stderr)
    return status


def _write_csv(path: Path, histories: Mapping[str, History]) -> None:
    """A line for each step."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*Record._fields, "optimizer"])
        for label, history in histories.items():
            writer.writerows([*record, label] for record in history)


def read_csv(path: Path) -> dict[str, History]:
    """Read a file of ``--csv``."""
    found: dict[str, History] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            history = found.setdefault(row["optimizer"], History(maxlen=10**9))
            names = ("total_norm", "max_norm", "clip_coef", "clipped_norm")
            norm, max_norm, clip_coef, clipped_norm = (float(row[name]) for name in names)
            loss, skipped = float(row["loss"]) if row["loss"] else None, row["skipped"] == "True"
            history.append(int(row["step"]), norm, max_norm, clip_coef, skipped, loss, clipped_norm)
    return found


def now() -> str:
    """The date and the time, for a page."""
    return datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
