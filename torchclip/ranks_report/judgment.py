"""Conclusions from what all ranks have: which gradients are the same, and which of them a call counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from torchclip.ranks_report.facts import Facts, Held, Ranks
from torchclip.ranks_report.fingerprints import Fingerprint

Unit = frozenset[int]
"""Ranks that a call counts together: those of a DTensor's mesh, or one rank with a plain tensor."""
Pattern = frozenset[frozenset[Unit]]
"""How a parameter is distributed: for each distinct part, the units that have it."""
Group = dict[int, Ranks]
"""The ranks of a process group, by the rank that passes it."""
Connected = Sequence[frozenset[int]]
"""For each rank, the ranks that a call connects with it, including itself."""


class Parameter:
    """A parameter on all ranks.

    Args:
        holders: each rank's part of it, without the ranks that have none.
        ranks: the number of all ranks.

    Attributes:
        missing: the ranks without it.
        replicas: lists of ranks that have the same part of the same weight.
        gradients: for each of these lists, its ranks in a list for each distinct gradient.
        has_different_weights: whether ranks have different weights as the same part.
        different: the first of ``gradients`` with more than one list; empty if there is none.
        pattern: how it is distributed.
    """

    def __init__(self, holders: dict[int, Held], ranks: int) -> None:
        self.holders = holders
        self.missing = tuple(rank for rank in range(ranks) if rank not in holders)
        self.has_gradient = any(held.gradient is not None for held in holders.values())
        of_part: dict[str, list[int]] = {}
        of_unit: dict[object, list[int]] = {}
        for rank, held in holders.items():
            of_part.setdefault(held.part, []).append(rank)
            of_unit.setdefault(held.mesh or rank, []).append(rank)
        self.is_sharded = len(of_part) > 1
        self.replicas = [
            some for ranks in of_part.values() for some in _alike(ranks, lambda rank: holders[rank].weight)
        ]
        self.gradients = [_alike(some, lambda rank: holders[rank].gradient) for some in self.replicas]
        self.has_different_weights = len(self.replicas) > len(of_part)
        self.different = next((lists for lists in self.gradients if len(lists) > 1), [])
        self._units = [frozenset(some) for some in of_unit.values()]
        unit_of = {rank: unit for unit in self._units for rank in unit}
        self.pattern = frozenset(frozenset(unit_of[rank] for rank in some) for some in self.replicas)

    def norms(self) -> Iterator[float]:
        """The norm of each distinct gradient."""
        for lists in self.gradients:
            for ranks in lists:
                gradient = self.holders[ranks[0]].gradient
                if gradient is not None:
                    yield gradient.norm

    def counted(self, connected: frozenset[int]) -> Iterator[float]:
        """The norms that a call joins on the ranks that it connects."""
        for unit in self._units:
            if not unit.isdisjoint(connected):
                of_unit = [self.holders[rank] for rank in sorted(unit, reverse=True)]
                yield from {held.part: held.gradient.norm for held in of_unit if held.gradient}.values()


def _alike(ranks: Iterable[int], get: Callable[[int], Fingerprint | None]) -> list[list[int]]:
    """Ranks in lists: the ranks in one list have the same tensor."""
    found: list[list[int]] = []
    for rank in ranks:
        own = get(rank)
        for some in found:
            other = get(some[0])
            if own.is_close(other) if own and other else own is other:
                some.append(rank)
                break
        else:
            found.append([rank])
    return found


def parameters_of(of_ranks: Sequence[Facts]) -> dict[str, Parameter]:
    """The parameters of all ranks by name."""
    names = dict.fromkeys(name for facts in of_ranks for name in facts.held)
    holders = {name: {r: f.held[name] for r, f in enumerate(of_ranks) if name in f.held} for name in names}
    return {name: Parameter(of_name, len(of_ranks)) for name, of_name in holders.items()}


def connections(groups: Sequence[Group], ranks: int) -> Connected:
    """The ranks that process groups connect, one after the other; a rank may be outside of them."""
    connected = []
    for rank in range(ranks):
        found = {rank}
        for group in groups:
            found |= {other for each in found for other in group.get(each, ())}
        connected.append(frozenset(found))
    return connected


def is_right(connected: Connected, pattern: Pattern) -> bool:
    """Whether a call counts each part of a parameter once on every rank."""
    return all(
        sum(not unit.isdisjoint(ranks) for unit in units) == 1
        for ranks in set(connected)
        for units in pattern
    )


def passed(of_ranks: Sequence[Facts]) -> list[Group]:
    """The process groups that the ranks pass to the call."""
    count = max(len(facts.passed) for facts in of_ranks)
    return [{r: f.passed[i] for r, f in enumerate(of_ranks) if i < len(f.passed)} for i in range(count)]
