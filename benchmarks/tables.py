"""The tables of the page on performance: what was measured, as data and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from contenders import NAMES, OPERATIONS
from other_rules import PLAIN, RuleRow
from steps import StepRow, doubt, how

Row = dict[str, Any]

__all__ = [
    "Row",
    "Table",
    "call_ratio",
    "call_tables",
    "in_short",
    "markdown",
    "notes",
    "rule_table",
    "step_ratio",
    "step_tables",
    "times",
]

MOST_DOUBT = 0.25
"""The largest relative error of a ratio that is shown.  On an idle machine it is at most 0.1."""

BUSY = "busy"
EXPLANATION = (
    f"{BUSY}: another program used the processor during the measurement, so that the ratio may be wrong by "
    f"more than {MOST_DOUBT:.0%}. Measure again on an idle machine."
)

PASSES = {"norm": 1, "no clipping": 1, "clipping": 3, "value": 2}  # over the gradients' bytes, at least
CACHED = 1 << 20  # bytes that fit into a core's cache, where the memory's bandwidth does not matter

PARAMETERS = {
    "torch, model.parameters()": "torch",
    "function, model.parameters()": "function",
    "function, the model": "function, model",
}
LISTS = {
    "torch, a list": "torch, a list",
    "function, a list": "function, a list",
    "torch, by value": "torch, by value",
    "function, by value": "function, by value",
}
"""The columns of the tables of steps: the contenders, and their headings."""

RULE_COLUMNS = (PLAIN, "timm", "Opacus", "kernel off", "torchclip")

RATIO = "torch ÷ torchclip"
SHORT_STEPS = [("mlp", "Adam"), ("layers", "AdamW fused")]
SHORT_WORKLOADS = ["resnet50", "gpt2"]


class Table(NamedTuple):
    """A title, the headings of the columns, and the rows; all but the first column are numbers."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def in_short(steps: Sequence[StepRow], rows: Sequence[Row]) -> Table:
    """A summary in four rows, with torch's function and torchclip's; fewer if fewer were measured."""
    found = []
    for row in steps:
        if row["clips"] and (row["model"], row["optimizer"]) in SHORT_STEPS:
            theirs, ours = (row["added"][f"{whose}, model.parameters()"] for whose in ("torch", "function"))
            ratio = step_ratio(row, "function, model.parameters()")
            found.append((f"a training step, {row['title']}, {how(row)}", theirs, ours, ratio))
    for row in rows:
        if row["operation"] == "clipping" and row["workload"] in SHORT_WORKLOADS:
            theirs, ours = (row["contenders"][name]["seconds"][1] for name in ("torch", "torchclip"))
            found.append(
                (f"one call, {row['title']}", theirs, ours, call_ratio(row["contenders"]["torchclip"]))
            )
    cells = [[title, _time(theirs), _time(ours), times(ratio)] for title, theirs, ours, ratio in found]
    return Table("In short: how long clipping takes", ["", "torch", "torchclip", RATIO], cells)


def step_tables(rows: Sequence[StepRow]) -> Iterator[Table]:
    """What clipping adds to a training step, in µs, and how many times less than torch that is.

    There are two tables for each model, since a page has no room for all columns.
    """
    for title, group in groupby(rows, lambda row: row["title"]):
        of_model = list(group)
        for columns, what in ((PARAMETERS, ""), (LISTS, ", from a list of parameters and by value")):
            cells = [[how(row), *(_added(row, name) for name in columns)] for row in of_model]
            yield Table(f"{title}: µs added to a training step{what}", ["", *columns.values()], cells)


def rule_table(rows: Sequence[RuleRow]) -> Table:
    """The times of the other rules, and how many times faster than a plain loop that is."""
    names = [name for name in RULE_COLUMNS if any(name in row["seconds"] for row in rows)]
    cells = [[f"{row['rule']}, {row['model']}", *(_of_rule(row, name) for name in names)] for row in rows]
    return Table("The other rules", ["", *names], cells)


def _of_rule(row: RuleRow, name: str) -> str:
    if name not in row["seconds"]:
        return ""
    time = _time(row["seconds"][name][0])
    return time if name not in row["speedup"] else f"{time} ({times(row['speedup'][name])})"


def call_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """The times of calls, a table for each workload; then bandwidth, and errors of the norms."""
    names = [name for name in NAMES if any(name in row["contenders"] for row in rows)]
    workloads = [list(group) for _, group in groupby(rows, lambda row: row["workload"])]
    for group in workloads:
        title = "{title}: {tensors:,} tensors, {elements:,} elements".format(**group[0])
        cells = [[OPERATIONS[row["operation"]], *_times_of(row, names)] for row in group]
        yield Table(title, ["", *names], cells)
    large = [group for group in workloads if group[0]["bytes"] > CACHED]
    cells = [[group[0]["title"], *map(_bandwidth, group)] for group in large]
    yield Table("torchclip's GB/s, and its share of the floor", ["", *OPERATIONS.values()], cells)
    errors = [
        [row["title"], *(_error(row["contenders"][name]["norm_error"]) for name in ("torch", "torchclip"))]
        for row in rows
        if row["operation"] == "norm"
    ]
    yield Table("Relative error of the norm", ["", "torch", "torchclip"], errors)


def notes(
    steps: Sequence[StepRow], rows: Sequence[Row], tables: Sequence[Table], rules: Sequence[RuleRow] = ()
) -> list[str]:
    """The text below the tables: how exact they are, which contenders failed, what ``busy`` means."""
    found = []
    if steps:
        apart = 1e6 * max(abs(row["added"]["no clipping again"]) for row in steps)
        found.append(
            "Steps: the lower quartile, on one thread; in brackets, how many times less than torch "
            f"adds. Two measurements of a step without clipping differ by up to {apart:.1f} µs."
        )
    if rules:
        found.append(
            "The other rules: the lower quartile, on one thread; in brackets, how many times faster than a "
            "plain loop of torch operations."
        )
    if rows:
        found.append("Calls: the median; in brackets, how many times faster than torch.")
    for row in rows:
        found += [
            f"{name} failed on {row['title']}, {OPERATIONS[row['operation']]}: {result['failed']}"
            for name, result in row["contenders"].items()
            if "failed" in result
        ]
    if any(BUSY in cell for table in tables for cells in table.rows for cell in cells):
        found.append(EXPLANATION)
    return found


def markdown(table: Table) -> str:
    """The table without its title."""
    lines = [table.columns, ["---", *["--:"] * (len(table.columns) - 1)], *table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _added(row: StepRow, name: str) -> str:
    text = f"{1e6 * row['added'][name]:.1f}"
    return f"{text} ({times(step_ratio(row, name))})" if name in row["speedup"] else text


def _times_of(row: Row, names: Sequence[str]) -> list[str]:
    results = row["contenders"]
    seconds = [_seconds(results.get(name)) for name in names]
    return [*seconds[:-1], f"{seconds[-1]} ({times(call_ratio(results['torchclip']))})"]


def _seconds(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return ""
    return "failed" if "failed" in result else _time(result["seconds"][1])


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:,.3g} {unit}"
    return f"{seconds * 1e6:,.3g} µs"


def _bandwidth(row: Row) -> str:
    own = row["contenders"]["torchclip"]
    traffic = PASSES[row["operation"]] * row["bytes"]
    return f"{traffic / own['seconds'][1] / 1e9:.1f} ({own['floor_share'][1]:.0%})"


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.0e}"


# Doubt


def step_ratio(row: Mapping[str, Any], name: str) -> float | None:
    """How many times less than torch a contender adds to a step, or None if the machine was busy.

    Args:
        row: a row of ``measure_steps``.
        name: the contender.
    """
    ratio: float = row["speedup"][name]
    return ratio if doubt(row, name) <= MOST_DOUBT else None


def call_ratio(result: Mapping[str, Any]) -> float | None:
    """How many times faster than torch a call is, the median, or None if the machine was busy.

    Args:
        result: one contender's in a row of ``measure``; half of the rounds lie between its quartiles.
    """
    first, median, third = map(float, result["speedup"])
    return median if third - first <= 2 * MOST_DOUBT * median else None


def times(ratio: float | None) -> str:
    """A ratio as a text."""
    return BUSY if ratio is None else f"{ratio:.1f}×"
