"""The report in words: the names of the parameters come first."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence

from torchclip._core.arguments import some
from torchclip.ranks_report.fingerprints import TOLERANCE
from torchclip.ranks_report.judgment import Parameter
from torchclip.ranks_report.recommendation import NOTHING, Advice

_MOST = 4
_WIDTH = 100


def report(
    parameters: dict[str, Parameter], norm: float, norms: Sequence[float], todo: Advice, has_group: bool
) -> str:
    """The report, except for the time that it took; ``norms`` are what the call returns on each rank."""
    if len(norms) == 1:
        return f"one process: nothing to compare.  The norm is {norm:.6g}."
    of_sentences: dict[str, list[str]] = {}
    for name, each in parameters.items():
        of_sentences.setdefault(_about(each), []).append(name)
    about = [f"{some(names, _MOST)}:\n{_wrapped(said, '    ')}" for said, names in of_sentences.items()]
    return "\n".join([*_about_norms(norm, norms, has_group), "", *about, "", *_what_to_do(todo)])


def _about_norms(norm: float, norms: Sequence[float], has_group: bool) -> list[str]:
    """What the call returns on each rank, whether the ranks agree, and whether the norm is right."""
    call = f"clip_grad_norm_ {'with this group' if has_group else 'without a group'} returns"
    alike: dict[float, list[int]] = {}
    for rank, own in enumerate(norms):
        same = next((other for other in alike if _is_close(own, other)), own)
        alike.setdefault(same, []).append(rank)
    of_each = [f"{own:.6g} on {_ranks(ranks)}" for own, ranks in alike.items()]
    if len(alike) == 1:
        first = f"{call} {norms[0]:.6g} on all {len(norms)} ranks: they agree."
    else:
        first = f"{call} {some(of_each, _MOST, '; ')}: the ranks do not agree, and clip by different factors."
    there = f"The norm of all gradients, each counted once, is {norm:.6g}"
    is_right = all(_is_close(own, norm) for own in norms)
    return [_wrapped(first), f"{there}: this is right." if is_right else f"{there}."]


def _is_close(a: float, b: float) -> bool:
    return a == b or math.isclose(a, b, rel_tol=TOLERANCE) or (math.isnan(a) and math.isnan(b))


def _about(each: Parameter) -> str:
    """What the report says about a parameter."""
    said = []
    if not each.has_gradient:
        said.append("No gradient on any rank.")
    elif each.different:
        said.append(_about_different(each))
    if each.has_different_weights:
        said.append(
            f"Different weights on {_sets(each.replicas)}: experts, stages, or shards made by hand, which "
            "need a group.  Or replicas that have moved apart, if they should be the same."
        )
    if each.missing:
        said.append(f"Missing on {_ranks(each.missing)}, as with pipeline stages, which need a group.")
    if not all(map(math.isfinite, each.norms())):
        said.append("The gradient is not finite.")
    if said:
        return " ".join(said)
    if each.is_sharded:
        return "DTensors, whose parts are joined.  Fine."
    return "Replicas with the same gradient on all ranks.  Fine."


def _about_different(each: Parameter) -> str:
    without = [rank for ranks in each.different for rank in ranks if each.holders[rank].gradient is None]
    if without:
        return (
            f"The same weight, but NO GRADIENT on {_ranks(without)}, where others have one.  Replicas need "
            "one on all ranks, such as zeros."
        )
    return (
        f"The same weight, but DIFFERENT GRADIENTS on {_sets(each.different)}.  Either these are replicas, "
        "and an all-reduce of their gradients is missing, or different parameters that start alike, such as "
        "experts, which need a group: check again after a step, when their weights differ."
    )


def _what_to_do(todo: Advice) -> list[str]:
    if todo.lines == [NOTHING]:
        return ["Nothing to do."]
    lines = ["What to do:", *(f"    {line}" for line in todo.lines)]
    lines += [f"{code} connects {_sets(sets)}." for code, sets in todo.groups.items()]
    if todo.unsolved:
        remedy = (
            "no process group that exists has each of these once on every rank.  Make one with "
            "torch.distributed.new_group, of the ranks across which they differ, and check again."
        )
        lines.append(_wrapped(f"{some(todo.unsolved, _MOST)}: {remedy}"))
    return lines


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)


def _sets(sets: Iterable[Iterable[int]]) -> str:
    """Sets of ranks, such as "ranks 0-1 | ranks 2-3"."""
    return some([_ranks(ranks) for ranks in sorted(map(sorted, sets))], _MOST, " | ")


def _ranks(ranks: Iterable[int]) -> str:
    """Ranks in order, such as "ranks 0-3, 6"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"{'rank' if sum(map(len, runs)) == 1 else 'ranks'} {some(texts, _MOST)}"
