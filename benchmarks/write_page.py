"""Put a measurement's table into this folder's README.md, between its two marks.

    python benchmarks/write_page.py

It reads results.json, and scaling.json where there is one, beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from check_targets import checks

from torchclip.bench import cells, headers, present
from torchclip.contenders import OPERATIONS

HERE = Path(__file__).parent
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def measured() -> str:
    """The machine, the table, and the verdict on every target, as Markdown."""
    report = json.loads((HERE / "results.json").read_text())
    scaling = HERE / "scaling.json"
    series = json.loads(scaling.read_text())["rows"] if scaling.exists() else []
    return "\n\n".join(
        [_machine(report["machine"]), _table(report["rows"]), _verdict(report["rows"], series)]
    )


def _machine(facts: dict[str, str]) -> str:
    return "\n".join(["```", *(f"{name:<18} {value}" for name, value in facts.items()), "```"])


def _table(rows: list[dict[str, Any]]) -> str:
    names = present(rows)
    columns = ["", *(header.replace("\n", " ") for header in headers(names))]
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    for row in rows:
        if row["operation"] == next(iter(OPERATIONS)):
            size = f"{row['tensors']:,} tensors, {row['elements']:,} elements"
            lines.append([f"**{row['title']}**, {size}", *[""] * (len(columns) - 1)])
        lines.append([f"`{OPERATIONS[row['operation']]}`", *cells(row, names)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _verdict(rows: list[dict[str, Any]], series: list[dict[str, Any]]) -> str:
    found = [*checks(rows), *(checks(series) if series else [])]
    missed = [check for check in found if not check.met]
    lines = (
        [f"{len(found) - len(missed)} of {len(found)} targets are met. Missed:\n"] if missed else ["All met."]
    )
    lines += [f"- {c.row}: {c.what} {c.measured:.2f}, target {c.at_least:.2g}" for c in missed]
    return "\n".join(lines)


def main() -> None:
    """Rewrite the page."""
    page = HERE / "README.md"
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{measured()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
