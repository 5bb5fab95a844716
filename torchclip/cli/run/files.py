"""The files that ``torchclip run`` writes: a picture, a table, a page."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from torchclip.history.history import History
from torchclip.history.records import Record

__all__ = ["Files"]

Histories = Mapping[str, History]


class Files(NamedTuple):
    """Where they go, if anywhere."""

    plot: Path | None
    csv: Path | None
    html: Path | None

    def write(self, histories: Histories) -> int:
        """Write all of them: 0, or 2 if one could not be written, which is said on stderr."""
        writers: dict[str, tuple[Path | None, Callable[[Path, Histories], None]]] = {
            "plot": (self.plot, _plot),
            "csv": (self.csv, _csv),
            "html": (self.html, _html),
        }
        status = 0
        for name, (path, write) in writers.items():
            if path is None:
                continue
            try:
                write(path, histories)
            except OSError as error:
                print(f"torchclip run: error: argument --{name}: {error.strerror}: {path}", file=sys.stderr)
                status = 2
            else:
                print(f"{name}: {path}", file=sys.stderr)
        return status


def _plot(path: Path, histories: Histories) -> None:
    from torchclip.cli.run.figure import histories_figure

    histories_figure(histories).savefig(path)


def _csv(path: Path, histories: Histories) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*Record._fields, "optimizer"])
        for label, history in histories.items():
            writer.writerows([*record, label] for record in history)


def _html(path: Path, histories: Histories) -> None:
    from torchclip.history.page import page

    single = len(histories) == 1
    named = {"" if single else label: history for label, history in histories.items()}
    title = f"Gradient norms of {next(iter(histories))}" if single else "Gradient norms"
    path.write_text(page(title, named), encoding="utf-8")
