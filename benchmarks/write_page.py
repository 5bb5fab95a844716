"""Put the measurements into docs/performance.md and the README's table of speed, each between its two marks.

    python benchmarks/write_page.py

It reads results.json beside it, and scaling.json and clip_and_step.json where they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from check_targets import checks

from torchclip.cli.bench.contenders import OPERATIONS
from torchclip.cli.bench.table import cells, headers, present
from torchclip.cli.bench.workloads import WORKLOADS

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
README = HERE.parent / "README.md"
PICTURES = {
    "figures/speed.png": "Speed relative to torch",
    "figures/scaling.png": "Cost a gradient and a byte",
}
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def measured() -> str:
    """The machine, the tables, the verdict on every target, and the pictures, as Markdown."""
    report = json.loads((HERE / "results.json").read_text())
    parts = [_machine(report["machine"]), _table(report["rows"])]
    parts += [_steps(rows) for rows in [_rows("clip_and_step.json")] if rows]
    parts.append(_verdict(report["rows"], _rows("scaling.json")))
    parts += [f"![{title}]({name})" for name, title in PICTURES.items() if (PAGE.parent / name).exists()]
    return "\n\n".join(parts)


def _rows(name: str) -> list[dict[str, Any]]:
    path = HERE / name
    return json.loads(path.read_text())["rows"] if path.exists() else []


def _machine(facts: dict[str, str]) -> str:
    return "\n".join(["```text", *(f"{name:<18} {value}" for name, value in facts.items()), "```"])


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


def _steps(rows: list[dict[str, Any]]) -> str:
    lines = [["clipping, and a step of fused AdamW; µs", *rows[0]["seconds"], "torch ÷ Clipper"]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for row in rows:
        times = [f"{seconds * 1e6:,.1f}" for seconds in row["seconds"].values()]
        lines.append([WORKLOADS[row["workload"]].title, *times, f"{row['speedup']:.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_short(rows: list[dict[str, Any]]) -> str:
    """The README's table: torch and torchclip, where clipping is not needed and where it is, as Markdown."""
    columns = ["gradients", "torch, not needed", "torchclip", "times faster"]
    lines = [[*columns, "torch, clipping", *columns[2:]], ["---", *["--:"] * 6]]
    for title in dict.fromkeys(row["title"] for row in rows):
        line = [title]
        for row in rows:
            if row["title"] == title and row["operation"] in ("no clipping", "clipping"):
                line += cells(row, ["torch", "torchclip"])[:3]  # two times, and how they compare
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _verdict(rows: list[dict[str, Any]], series: list[dict[str, Any]]) -> str:
    found = [*checks(rows), *(checks(series) if series else [])]
    missed = [check for check in found if not check.met]
    lines = (
        [f"{len(found) - len(missed)} of {len(found)} targets are met. Missed:\n"] if missed else ["All met."]
    )
    lines += [f"- {c.row}: {c.what} {c.measured:.2f}, target {c.at_least:.2g}" for c in missed]
    return "\n".join(lines)


def rewrite(page: Path, text: str) -> None:
    """Put a text between the marks of a page."""
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")


def main() -> None:
    """Rewrite both."""
    rewrite(PAGE, measured())
    rewrite(README, in_short(_rows("results.json")))


if __name__ == "__main__":
    main()
