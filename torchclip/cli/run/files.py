"""The files that ``torchclip run`` writes: a picture, a table, a page."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torchclip.history.history import History
from torchclip.history.records import Record

__all__ = ["Files", "read_csv", "write_csv"]

Histories = Mapping[str, History]


class Files(NamedTuple):
    """Where they go, if anywhere."""

    plot: Path | None
    csv: Path | None
    html: Path | None

    def write(self, histories: Histories, about: Mapping[str, Sequence[str]]) -> int:
        """Write all of them: 0, or 2 if one could not be written, which is said on stderr.

        Args:
            histories: the steps, by optimizer.
            about: what the page says beside them, by optimizer, and of all of them under the empty name.
        """
        writers: dict[str, tuple[Path | None, Callable[[Path, Histories], None]]] = {
            "plot": (self.plot, _plot),
            "csv": (self.csv, write_csv),
            "html": (self.html, lambda path, histories: _html(path, histories, about)),
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


def write_csv(path: Path, histories: Histories) -> None:
    """A line for each step."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*Record._fields, "optimizer"])
        for label, history in histories.items():
            writer.writerows([*record, label] for record in history)


def read_csv(path: Path) -> dict[str, History]:
    """What ``write_csv`` wrote; in files of earlier versions there is no loss."""
    found: dict[str, History] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            history = found.setdefault(row["optimizer"], History(maxlen=10**9))
            norm, max_norm, clip_coef = map(float, (row["total_norm"], row["max_norm"], row["clip_coef"]))
            loss = float(row["loss"]) if row.get("loss") else None
            history.append(int(row["step"]), norm, max_norm, clip_coef, row["skipped"] == "True", loss)
    return found


def _html(path: Path, histories: Histories, about: Mapping[str, Sequence[str]]) -> None:
    from torchclip.history.page import page

    title = f"Gradient norms of {next(iter(histories))}" if len(histories) == 1 else "Gradient norms"
    path.write_text(page(title, histories, about), encoding="utf-8")
