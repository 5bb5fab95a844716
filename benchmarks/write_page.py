"""Put the measurements into docs/performance.md and into the README's table of speed, between their marks.

    python benchmarks/write_page.py

It reads the JSON files in its own folder, which steps.py, calls.py, other_rules.py and clip_and_step.py
wrote, all at one commit, and draws the pictures of the page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from check_targets import Check, checks, missed
from contenders import OPERATIONS
from pictures import benchmark_figure, drawn, scaling_figure
from tables import Table, call_tables, in_short, markdown, notes, rule_table, step_tables
from workloads import WORKLOADS

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
README = HERE.parent / "README.md"
IN_STEPS = (
    "`torch` and `function` are `clip_grad_norm_(model.parameters(), …)` of torch and of torchclip; "
    "`function, model` is `torchclip.clip_grad_norm_(model, …)`."
)
WHAT = {
    "function, model.parameters(), in a step": "`clip_grad_norm_(model.parameters(), …)`",
    "function, the model, in a step": "`clip_grad_norm_(model, …)`",
    "function, a list, in a step": "`clip_grad_norm_` of a list",
    "function, by value, in a step": "`clip_grad_value_`",
    "torch ÷ torchclip": "",
    "torch ÷ torchclip, kernel off": "",
    "plain loop ÷ torchclip": "",
    "plain loop ÷ kernel off": "",
    "share of the plain sum's bandwidth": "The share of the bandwidth of `sum()`",
    "cost of a gradient, from 10 to 100,000": "The lowest cost ÷ the highest, from 10 to 100,000 gradients",
    "cost of a byte, compared with memory traffic alone": "The time of memory traffic alone ÷ torchclip's",
}
"""How the page names a target; it needs no name where the title of its entry in the list says enough."""
WITH_TARGETS = ("steps.json", "results.json", "scaling.json", "other_rules.json")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

Report = dict[str, Any]


def read(name: str) -> Report:
    """What a script wrote with ``--json``."""
    found: Report = json.loads((HERE / name).read_text(encoding="utf-8"))
    return found


def check_one_commit(reports: dict[str, Report]) -> None:
    """Refuse measurements of different commits, which do not belong on one page."""
    commits = {name: report["machine"].get("commit", "unknown") for name, report in reports.items()}
    if len(set(commits.values())) > 1:
        found = ", ".join(f"{name} of {commit}" for name, commit in commits.items())
        sys.exit(
            f"write_page.py: these were measured at different commits: {found}; measure all of them again"
        )


def page(reports: dict[str, Report]) -> str:
    """What users need, the targets that were missed, and all measurements, folded, as Markdown."""
    calls, steps = reports["results.json"], reports["steps.json"]
    together = clip_and_step(reports["clip_and_step.json"]["rows"])
    return "\n\n".join(
        [
            short(calls, steps),
            "![The speedup over torch, in a training step and of one call](figures/speed.png)",
            "## Missed targets",
            _missed([check for name in WITH_TARGETS for check in checks(reports[name]["rows"])]),
            "## All measurements",
            _folded("In a training step", *_of_steps(steps)),
            _folded("By itself, in a tight loop", *_of_calls(calls)),
            _folded("Other rules", *_of_rules(reports["other_rules.json"]["rows"])),
            _folded("Clipping and a step", markdown(together)),
            _folded("Many and large gradients", "![Cost a gradient and a byte](figures/scaling.png)"),
        ]
    )


def _of_steps(steps: Report) -> Iterator[str]:
    tables = list(step_tables(steps["rows"]))
    yield IN_STEPS
    yield from _titled(tables)
    yield from notes(steps["rows"], [], tables)
    yield f"Measured on: {_in_words(steps['machine'])}, one thread."


def _of_calls(calls: Report) -> Iterator[str]:
    tables = [table for table in call_tables(calls["rows"]) if table.rows]
    yield "\n".join(["```text", *(f"{k:<18} {v}" for k, v in calls["machine"].items()), "```"])
    yield from _titled(tables)
    yield from notes([], calls["rows"], tables)


def _of_rules(rows: list[dict[str, Any]]) -> Iterator[str]:
    table = rule_table(rows)
    yield markdown(table)
    yield from notes([], [], [table], rows)


def _titled(tables: list[Table]) -> Iterator[str]:
    return (f"**{table.title}**\n\n{markdown(table)}" for table in tables)


def _folded(title: str, *parts: str) -> str:
    """A section that the reader unfolds, on the site and on GitHub."""
    inner = "\n\n".join(parts)
    return f'<details markdown="1">\n<summary>{title}</summary>\n\n{inner}\n\n</details>'


def clip_and_step(rows: list[dict[str, Any]]) -> Table:
    """Clipping and a step of fused AdamW together."""
    columns = ["µs", *rows[0]["seconds"], "torch ÷ torchclip"]
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


def _missed(found: list[Check]) -> str:
    """One list: the missed targets that share a reason, and the reason."""
    met = sum(check.met for check in found)
    if met == len(found):
        return f"None: all {met} are met."
    lines = [
        f"{met} of {len(found)} targets are met. A target says how many times faster than torch, or than a "
        "plain loop of torch operations, torchclip should be, unless the entry says otherwise. The missed "
        "targets:\n"
    ]
    for title, of_reason, reason in missed(found):
        groups: dict[tuple[str, float], list[Check]] = {}
        for check in of_reason:
            groups.setdefault((check.what, check.at_least), []).append(check)
        parts = [_group(what, target, of_group) for (what, target), of_group in groups.items()]
        lines.append(f"- **{title}.** {'; '.join(parts)}. {reason}".rstrip())
    return "\n".join(lines)


def _group(what: str, target: float, checks: list[Check]) -> str:
    if len(checks) <= 2:
        rows = "; ".join(f"{check.row}: {check.measured:.2f}" for check in checks)
    else:
        measured = [check.measured for check in checks]
        rows = f"{min(measured):.2f} to {max(measured):.2f} in {len(checks)} rows"
    name = WHAT.get(what, what)
    return f"{name}: {rows} (target {target:.3g})" if name else f"{rows} (target {target:.3g})"


def rewrite(page: Path, text: str) -> None:
    """Put a text between the marks of a page."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    """Rewrite both pages, and draw the pictures."""
    reports = {name: read(name) for name in (*WITH_TARGETS, "clip_and_step.json")}
    check_one_commit(reports)
    calls, steps = reports["results.json"], reports["steps.json"]
    rewrite(PAGE, page(reports))
    rewrite(README, short(calls, steps))
    figures = PAGE.parent / "figures"
    speed = benchmark_figure(calls["rows"], OPERATIONS, steps["rows"])
    # A test compares the numbers of the picture with the tables of the page.
    speed.savefig(figures / "speed.png", metadata={"Ratios": json.dumps(drawn(speed))})
    scaling_figure(reports["scaling.json"]["rows"]).savefig(figures / "scaling.png")


if __name__ == "__main__":
    main()
