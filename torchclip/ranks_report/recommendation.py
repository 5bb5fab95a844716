"""What to call instead, as code: with the process groups that connect exactly the ranks that differ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from torchclip.ranks_report.facts import Facts, Ranks
from torchclip.ranks_report.judgment import UNNAMED, Choice, Parameter, choices

NOTHING = "nothing to do"
_AVERAGE = "# First average the gradients of report.different over replicas; count a missing one as zeros."

_NO_GROUP = "# No process group that exists is right; the report says why."


class InCode(NamedTuple):
    """How code names what was checked.

    Attributes:
        parameters: the parameters.
        by_name: a dictionary of them.
        optimizer: the optimizers of a Clipper; empty without one.
    """

    parameters: str
    by_name: str
    optimizer: str = ""


class Advice(NamedTuple):
    """What to do.

    Attributes:
        lines: the code.
        groups: the process groups in it, by their code: the sets of ranks that each connects.
        unsolved: the names of parameters for which no process group can be right.
    """

    lines: list[str]
    groups: dict[str, list[Ranks]]
    unsolved: list[str]


def advice(parameters: dict[str, Parameter], of_ranks: Sequence[Facts], code: InCode, used: Choice) -> Advice:
    """What to do.

    Args:
        parameters: those that have gradients.
        of_ranks: what all ranks have.
        code: how code names what was checked.
        used: what the call gets as its `group` now.
    """
    result = Advice([], {}, [])
    options = choices(of_ranks)
    different = [each for each in parameters.values() if each.has_different_gradients]
    if different:
        apart = {each.pattern(by_gradient=True) for each in different}
        fitting = next((each for each in options if all(map(each.is_right, apart))), options[0])
        argument = _argument(fitting, result).removeprefix(", ")
        result.lines.append(_AVERAGE)
        if argument:
            result.lines.append(f"# Or pass {argument} for them, if they are different parameters.")
    patterns = {name: each.pattern() for name, each in parameters.items()}
    distinct = list(dict.fromkeys(patterns.values()))
    if all(map(used.is_right, distinct)):
        result.lines.append("# Then clip as before." if different else NOTHING)
        return result
    whole = next((option for option in options if all(map(option.is_right, distinct))), None)
    if whole is not None:
        result.lines.append(_one_call(code, _argument(whole, result)))
        return result
    right = {pattern: next((o for o in options if o.is_right(pattern)), None) for pattern in distinct}
    sets: dict[str, list[str]] = {}
    for name, pattern in patterns.items():
        option = right[pattern]
        if option is None:
            result.unsolved.append(name)
        else:
            sets.setdefault(_argument(option, result), []).append(name)
    result.lines.extend([_NO_GROUP] if result.unsolved else _joint_call(code, sets))
    return result


def _argument(option: Choice, result: Advice) -> str:
    """The argument `group` of a call with a comma before it, or nothing; notes which groups it names."""
    codes: list[str] = []
    for description, of_rank in option.groups:
        sets = sorted(set(of_rank.values()))
        known = [name for name, others in result.groups.items() if name[:5] == "group" and others == sets]
        code = _name(description) or next(iter(known), f"group{len(result.groups) or ''}")
        result.groups[code] = sets
        codes.append(code)
    if not codes:
        return ""
    return f", group={codes[0]}" if len(codes) == 1 else f", group=[{', '.join(codes)}]"


def _name(description: str) -> str | None:
    """A process group as code, by its description; None if it has no name."""
    of_mesh = re.fullmatch(r"mesh_(?:dim_(\d+)|(\w+))", description)
    if of_mesh:
        number, name = of_mesh.groups()
        return f"mesh.get_group({number})" if number else f'mesh["{name}"].get_group()'
    if description == "default_pg":
        return "torch.distributed.group.WORLD"
    is_name = description.isidentifier() and description not in UNNAMED
    return description if is_name else None


def _one_call(code: InCode, group: str) -> str:
    if code.optimizer:
        return f"clipper = torchclip.Clipper({code.optimizer}, max_norm=1.0{group})"
    return f"torchclip.clip_grad_norm_({code.parameters}, 1.0{group})"


def _joint_call(code: InCode, sets: dict[str, list[str]]) -> list[str]:
    """Clipping by the joint norm of sets of parameters, each with the `group` that it needs."""
    which = {group: f"in {names}" for group, names in sets.items()}
    if len(sets) == 2 and "" in sets:
        which = {group: "in report.local" if group else "not in report.local" for group in sets}
    return [
        *(["# In place of the Clipper, before each step:"] if code.optimizer else []),
        f"grads = {{name: p.grad for name, p in {code.by_name} if p.grad is not None}}",
        *(
            f"part{i} = [grad for name, grad in grads.items() if name {names}]"
            for i, names in enumerate(which.values())
        ),
        *(f"norm{i} = torchclip.get_total_norm(part{i}{group})" for i, group in enumerate(which)),
        f"total_norm = torchclip.get_total_norm([{', '.join(f'norm{i}' for i in range(len(sets)))}])",
        f"torchclip.clip_grads_with_norm_({code.parameters}, 1.0, total_norm)",
    ]
