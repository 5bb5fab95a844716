"""Put the measurements into docs/performance.md and into the README's table of speed, between their marks.

    python benchmarks/write_page.py

It reads the JSON files in its own folder, which steps.py, calls.py, other_rules.py and clip_and_step.py
wrote, and draws the pictures of the page.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from check_targets import checks
from contenders import OPERATIONS
from pictures import benchmark_figure, scaling_figure
from tables import Table, call_tables, in_short, markdown, notes, rule_table, step_tables
from workloads import WORKLOADS

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
README = HERE.parent / "README.md"
IN_STEPS = (
    "`torch` and `function` are `clip_grad_norm_(model.parameters(), …)` of torch and of torchclip; "
    "`function, model` is `torchclip.clip_grad_norm_(model, …)`."
)
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

Report = dict[str, Any]


def read(name: str) -> Report:
    """What a script wrote with ``--json``."""
    found: Report = json.loads((HERE / name).read_text(encoding="utf-8"))
    return found


def page(calls: Report, steps: Report, scaling: Report) -> str:
    """The machine, the tables, the verdict on every target, and the pictures, as Markdown."""
    of_steps = list(step_tables(steps["rows"]))
    of_calls = [table for table in call_tables(calls["rows"]) if table.rows]
    rules = read("other_rules.json")["rows"]
    together = read("clip_and_step.json")["rows"]
    return "\n\n".join(
        [
            "### In a training step",
            IN_STEPS,
            *(f"**{table.title}**\n\n{markdown(table)}" for table in of_steps),
            *notes(steps["rows"], [], of_steps),
            f"Measured on: {_in_words(steps['machine'])}, one thread.",
            "### By itself, in a tight loop",
            "\n".join(["```text", *(f"{k:<18} {v}" for k, v in calls["machine"].items()), "```"]),
            *(f"**{table.title}**\n\n{markdown(table)}" for table in of_calls),
            *notes([], calls["rows"], of_calls),
            f"### Other rules\n\n{markdown(rule_table(rules))}",
            *notes([], [], [rule_table(rules)], rules),
            f"### Clipping and a step\n\n{markdown(clip_and_step(together))}",
            "### Targets\n\n" + _verdict(calls["rows"], scaling["rows"]),
            "![Speed relative to torch](figures/speed.png)",
            "![Cost a gradient and a byte](figures/scaling.png)",
        ]
    )


def clip_and_step(rows: list[dict[str, Any]]) -> Table:
    """Clipping and a step of fused AdamW together."""
    columns = ["µs", *rows[0]["seconds"], "torch ÷ Clipper"]
    cells = [
        [
            WORKLOADS[row["workload"]].title,
            *(f"{seconds * 1e6:,.1f}" for seconds in row["seconds"].values()),
            f"{row['speedup']:.2f}",
        ]
        for row in rows
    ]
    return Table("", columns, cells)


def short(calls: Report, steps: Report) -> str:
    """The README's four rows, as Markdown."""
    table = in_short(steps["rows"], calls["rows"])
    return f"{markdown(table)}\n\n{_in_words(calls['machine'])}, {calls['machine']['cores']} cores."


def _in_words(machine: dict[str, str]) -> str:
    return f"{machine['CPU']}, kernel {machine['CPU kernel']}, torch {machine['torch']}"


def _verdict(rows: list[dict[str, Any]], series: list[dict[str, Any]]) -> str:
    found = [*checks(rows), *checks(series)]
    missed = [check for check in found if not check.met]
    lines = (
        [f"{len(found) - len(missed)} of {len(found)} targets are met. Missed:\n"] if missed else ["All met."]
    )
    lines += [f"- {c.row}: {c.what} {c.measured:.2f}, target {c.at_least:.2g}" for c in missed]
    return "\n".join(lines)


def rewrite(page: Path, text: str) -> None:
    """Put a text between the marks of a page."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    """Rewrite both pages, and draw the pictures."""
    calls, steps, scaling = read("results.json"), read("steps.json"), read("scaling.json")
    rewrite(PAGE, page(calls, steps, scaling))
    rewrite(README, short(calls, steps))
    figures = PAGE.parent / "figures"
    benchmark_figure(calls["rows"], OPERATIONS, steps["rows"]).savefig(figures / "speed.png")
    scaling_figure(scaling["rows"]).savefig(figures / "scaling.png")


if __name__ == "__main__":
    main()
