"""Which targets of ``targets.json`` measurements meet, and which they miss.

    python benchmarks/check_targets.py RESULTS.json...

RESULTS.json is what ``calls.py`` (with or without ``--scaling``), ``steps.py`` or ``other_rules.py`` wrote.
The exit status is 1 if a target is missed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TARGETS = json.loads(Path(__file__).with_name("targets.json").read_text(encoding="utf-8"))

Row = dict[str, Any]


class Check(NamedTuple):
    """A target, and what was measured: medians."""

    row: str
    what: str
    measured: float
    at_least: float

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        return self.measured >= self.at_least

    def __str__(self) -> str:
        verdict = "met   " if self.met else "MISSED"
        return f"{verdict} {self.row:<46} {self.what:<34} {self.measured:8.2f}  (target {self.at_least:g})"


def checks(rows: list[Row]) -> list[Check]:
    """All targets for which there are rows, of one script."""
    if any(row.get("workload", "").endswith("-tensors") for row in rows):
        return list(_flatness(rows))
    of_row = _of_step if "added" in rows[0] else _of_rule if "rule" in rows[0] else _of_row
    return [check for row in rows for check in of_row(row)]


def missed(found: Sequence[Check]) -> Iterator[tuple[str, list[Check], str]]:
    """The missed targets that share a reason: a title, the targets, and the reason."""
    left = [check for check in found if not check.met]
    for reason in TARGETS["reasons"]:
        those = [check for check in left if re.search(reason["of"], f"{check.row}: {check.what}")]
        left = [check for check in left if check not in those]
        if those:
            yield reason["title"], those, reason["why"]
    for check in left:
        yield check.row, [check], ""


def _of_step(row: Row) -> Iterator[Check]:
    name = f"{row['title']}, {row['optimizer']}, {'clipping' if row['clips'] else 'not needed'}"
    for contender, target in TARGETS["in_a_step"][row["model"]].items():
        yield Check(name, f"{contender}, in a step", row["speedup"][contender], target)


def _of_rule(row: Row) -> Iterator[Check]:
    name = f"{row['rule']}, {row['model']}"
    targets = TARGETS["other_rules"]
    if name in targets["torchclip"]:
        yield Check(name, "plain loop ÷ torchclip", row["speedup"]["torchclip"], targets["torchclip"][name])
    yield Check(name, "plain loop ÷ kernel off", row["speedup"]["kernel off"], targets["kernel off"])


def _of_row(row: Row) -> Iterator[Check]:
    workload, operation = row["workload"], row["operation"]
    name = f"{row['title']}, {operation}"
    own, others = row["contenders"]["torchclip"], row["contenders"]

    target = TARGETS["speedup"][workload].get(operation)
    if target is not None:
        yield Check(name, "torch ÷ torchclip", own["speedup"][1], target)
    if "seconds" in others.get("optax", {}):
        speedup = others["optax"]["seconds"][1] / own["seconds"][1]
        yield Check(name, "optax ÷ torchclip", speedup, TARGETS["speedup_over_optax"])
    eager = others.get("kernel off", own)
    yield Check(name, "torch ÷ torchclip, kernel off", eager["speedup"][1], TARGETS["speedup_of_eager"])
    reading = TARGETS["read_pass_share_of_floor"]
    if operation in ("norm", "no clipping") and workload in reading["workloads"]:
        yield Check(name, "share of the plain sum's bandwidth", own["floor_share"][1], reading["at_least"])


def _flatness(rows: list[Row]) -> Iterator[Check]:
    """How flat the costs are: of a gradient, the smallest divided by the largest; of a byte, the worst ratio
    of the memory traffic's time to the time of the call.
    """
    (of_gradient, gradient_limit), (of_byte, byte_limit) = TARGETS["growth_of_cost"].items()
    for operation in dict.fromkeys(row["operation"] for row in rows):
        chosen = [row for row in rows if row["operation"] == operation]
        many = [_median(row) / row["tensors"] for row in chosen if row["workload"].endswith("-tensors")]
        yield Check(operation, f"cost of {of_gradient}", min(many) / max(many), 1 / gradient_limit)
        shares = [row["contenders"]["torchclip"]["floor_share"][1] for row in chosen if row["tensors"] == 1]
        yield Check(operation, f"cost of {of_byte}", min(shares), 1 / byte_limit)


def _median(row: Row) -> float:
    median: float = row["contenders"]["torchclip"]["seconds"][1]
    return median


def main() -> int:
    """Print the checks, with missed targets last."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    reports = [json.loads(Path(path).read_text(encoding="utf-8")) for path in sys.argv[1:]]
    found = [check for report in reports for check in checks(report["rows"])]
    for check in sorted(found, key=lambda check: not check.met):
        print(check)
    met = sum(check.met for check in found)
    print(f"{met} of {len(found)} targets met")
    return 0 if met == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
