"""Put the measurements into docs/performance.md and the README's table of speed, each between its two marks.

    torchclip bench --only steps --json benchmarks/steps.json
    python benchmarks/write_page.py

It reads steps.json and results.json beside it, and scaling.json and clip_and_step.json where they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from check_targets import checks

from torchclip.cli.bench.contenders import OPERATIONS
from torchclip.cli.bench.steps import COLUMNS
from torchclip.cli.bench.table import cells, headers, present
from torchclip.cli.bench.workloads import WORKLOADS

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
README = HERE.parent / "README.md"
ALL_COLUMNS = {
    "torch, a list": "torch, a list",
    "function, a list": "function, a list",
    **COLUMNS,
    "torch, by value": "torch, by value",
    "function, by value": "function, by value",
}
"""Of the page, which has room for all who were measured."""
PICTURES = {
    "figures/speed.png": "Speed relative to torch",
    "figures/scaling.png": "Cost a gradient and a byte",
}
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def measured() -> str:
    """The machine, the tables, the verdict on every target, and the pictures, as Markdown."""
    report = json.loads((HERE / "results.json").read_text())
    steps = json.loads((HERE / "steps.json").read_text())
    parts = ["### Inside of a training step", in_steps(steps, ALL_COLUMNS), "### By itself, in a tight loop"]
    parts += [_machine(report["machine"]), _table(report["rows"])]
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


def in_steps(report: dict[str, Any], columns: dict[str, str]) -> str:
    """What clipping adds to a training step, and on which machine that was measured, as Markdown.

    Args:
        report: what ``torchclip bench --only steps --json`` wrote.
        columns: the contenders to show, and what to call them.
    """
    titles = [title.replace("\n", " ") for title in columns.values()]
    lines = [["µs added to a step", *titles], ["---", *["--:"] * len(titles)]]
    for row in report["steps"]:
        cells = [f"{1e6 * row['added'][name][0]:.1f}" for name in columns]
        for i, name in enumerate(columns):
            if name in row["speedup"]:
                quartile, mean = row["speedup"][name]
                cells[i] += f" ({quartile:.1f}×, {mean:.1f}×)"
        what = "clipping" if row["clips"] else "idle"
        lines.append([f"{row['title']}, {row['optimizer']}, {what}", *cells])
    doubt = 1e6 * max(abs(row["added"]["no clipping once more"][0]) for row in report["steps"])
    machine = report["machine"]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + (
        f"\n\n{machine['CPU']}, kernel {machine['CPU kernel']}, torch {machine['torch']}, one thread. Lower "
        "quartiles; in brackets torch's divided by it, of the quartiles and of the means without the slowest "
        f"5 %. Two measurements of a step without clipping differ by up to {doubt:.1f} µs."
    )


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
    rewrite(README, in_steps(json.loads((HERE / "steps.json").read_text()), COLUMNS))


if __name__ == "__main__":
    main()
