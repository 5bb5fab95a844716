"""The right call, as code: with the process groups that connect exactly the ranks that differ."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torchclip.ranks_report.facts import Facts, Ranks
from torchclip.ranks_report.judgment import Connected, Group, Parameter, connections, is_right

NOTHING = "nothing to do"
_AVERAGE = "# First average the gradients of report.different over replicas; count a missing one as zeros."
_NO_GROUP = "# No process group that exists is right; the report says why."


class InCode(NamedTuple):
    """How code names what was checked.

    Attributes:
        parameters: the parameters.
        by_name: a dictionary of them.
        is_clipper: whether it is a Clipper.
    """

    parameters: str
    by_name: str
    is_clipper: bool = False


class Advice(NamedTuple):
    """What to do.

    Attributes:
        lines: the code.
        groups: the process groups in the code: the sets of ranks that each one connects.
        unsolved: the names of parameters for which no process group is right.
    """

    lines: list[str]
    groups: dict[str, set[Ranks]]
    unsolved: list[str]


def advice(
    parameters: dict[str, Parameter], of_ranks: Sequence[Facts], code: InCode, used: Connected
) -> Advice:
    """What to do with the parameters that have gradients, if the call connects what is in ``used``."""
    first = [_AVERAGE] if any(each.different for each in parameters.values()) else []
    patterns = dict.fromkeys(each.pattern for each in parameters.values())
    if all(is_right(used, pattern) for pattern in patterns):
        return Advice([*first, "# Then clip as before."] if first else [NOTHING], {}, [])
    existing = _groups(of_ranks)
    options = {"": connections([], len(of_ranks))}
    options |= {name: connections([group], len(of_ranks)) for name, group in existing.items()}
    whole = next((o for o, some in options.items() if all(is_right(some, p) for p in patterns)), None)
    if whole is not None:
        lines, named = [_one_call(code, whole)], [whole]
    else:
        right = {p: next((o for o, some in options.items() if is_right(some, p)), None) for p in patterns}
        unsolved = [name for name, each in parameters.items() if right[each.pattern] is None]
        if unsolved:
            return Advice([*first, _NO_GROUP], {}, unsolved)
        sets: dict[str, list[str]] = {}
        for name, each in parameters.items():
            sets.setdefault(right[each.pattern] or "", []).append(name)
        lines, named = _joint_call(code, sets), [*sets]
    return Advice([*first, *lines], {o: set(existing[o].values()) for o in named if o}, [])


def _groups(of_ranks: Sequence[Facts]) -> dict[str, Group]:
    """The existing process groups, by their code: those with a name first, and those of all ranks last."""
    families: dict[str, Group] = {}
    for rank, facts in enumerate(of_ranks):
        counts: Counter[str] = Counter()
        for description, group in facts.groups:
            families.setdefault(_name(description, counts[description]), {})[rank] = group
            counts[description] += 1
    is_whole = {code: len(of_ranks) in map(len, group.values()) for code, group in families.items()}
    return {code: families[code] for code in sorted(families, key=lambda c: (is_whole[c], c[:5] == "group"))}


def _name(description: str, number: int) -> str:
    """A process group as code, by its description and the number of earlier groups with the same one."""
    which = str(number or "")
    of_mesh = re.fullmatch(r"mesh_(?:dim_(\d+)|(\w+))", description)
    if of_mesh:
        dimension, name = of_mesh.groups()
        return f"mesh{which}.get_group({dimension})" if dimension else f'mesh{which}["{name}"].get_group()'
    if description == "default_pg":
        return "torch.distributed.group.WORLD"
    has_name = description.isidentifier() and description not in ("None", "undefined")
    return f"{description}{which}" if has_name else f"group{which}"


def _one_call(code: InCode, group: str) -> str:
    if code.is_clipper:
        return f"clipper = torchclip.Clipper(optimizer, max_norm=1.0{_argument(group)})"
    return f"torchclip.clip_grad_norm_({code.parameters}, 1.0{_argument(group)})"


def _joint_call(code: InCode, sets: dict[str, list[str]]) -> list[str]:
    """Clipping by the joint norm of sets of parameters, each with the `group` that it needs."""
    which = {group: f"in {names}" for group, names in sets.items()}
    if len(sets) == 2 and "" in sets:
        which = {group: "in report.local" if group else "not in report.local" for group in sets}
    parts = [
        f"part{i} = [grad for name, grad in grads.items() if name {names}]"
        for i, names in enumerate(which.values())
    ]
    norms = [f"norm{i} = torchclip.get_total_norm(part{i}{_argument(g)})" for i, g in enumerate(sets)]
    return [
        *(["# In place of the Clipper, before each step:"] if code.is_clipper else []),
        f"grads = {{name: p.grad for name, p in {code.by_name} if p.grad is not None}}",
        *parts,
        *norms,
        f"total_norm = torchclip.get_total_norm([{', '.join(f'norm{i}' for i in range(len(sets)))}])",
        f"torchclip.clip_grads_with_norm_({code.parameters}, 1.0, total_norm)",
    ]


def _argument(group: str) -> str:
    return f", group={group}" if group else ""
