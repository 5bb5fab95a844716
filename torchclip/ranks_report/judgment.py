"""What follows from what all ranks have: which gradients are the same one, and what a call counts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

from torchclip.ranks_report.facts import Facts, Held, Ranks
from torchclip.ranks_report.fingerprints import are_close

UNNAMED = ("", "None", "undefined")
"""The descriptions of process groups that were made without one."""

Unit = frozenset[int]
"""Ranks that a call counts together: those of a DTensor's mesh, or one rank with a plain tensor."""
Pattern = frozenset[frozenset[Unit]]
"""How a parameter lies: for each part that differs from the others, the units that have it."""
Connected = Sequence[frozenset[int]]
"""For each rank, the ranks that a call connects with it, and itself."""


class Parameter:
    """A parameter on all ranks.

    Args:
        holders: what each rank has of it; ranks without it are not in there.
        ranks: the number of all ranks.

    Attributes:
        missing: the ranks without it.
        clusters: for each part and weight, the ranks that have it, in a list for each gradient.
        is_split: whether ranks with the same weight are taken for holders of different parameters.
    """

    def __init__(self, holders: dict[int, Held], ranks: int) -> None:
        self.holders = holders
        self.missing = tuple(rank for rank in range(ranks) if rank not in holders)
        self.has_gradient = any(held.norm is not None for held in holders.values())
        self.is_sharded = len({held.part for held in holders.values()}) > 1
        alike: dict[tuple[str, int], list[int]] = {}
        of_unit: dict[object, list[int]] = {}
        for rank, held in holders.items():
            alike.setdefault((held.part, held.weight), []).append(rank)
            of_unit.setdefault(held.mesh or rank, []).append(rank)
        self.clusters = [self._by_gradient(some) for some in alike.values()]
        self._units = [frozenset(some) for some in of_unit.values()]
        self.is_split = False

    @property
    def has_different_weights(self) -> bool:
        """Whether ranks have different weights as the same part."""
        return len(self.clusters) > len({held.part for held in self.holders.values()})

    @property
    def has_different_gradients(self) -> bool:
        """Whether ranks with the same weight have different gradients, or some have none."""
        return any(len(by_gradient) > 1 for by_gradient in self.clusters)

    def pattern(self, by_gradient: bool = False) -> Pattern:
        """How it lies; ``by_gradient`` if ranks with different gradients have different parameters."""
        unit_of = {rank: unit for unit in self._units for rank in unit}
        sets = self.gradients() if by_gradient else self.replicas()
        return frozenset(frozenset(unit_of[rank] for rank in ranks) for ranks in sets)

    def replicas(self) -> list[list[int]]:
        """The ranks with the same part of the same weight, in a list for each."""
        return [sorted(rank for some in by_gradient for rank in some) for by_gradient in self.clusters]

    def gradients(self) -> list[list[int]]:
        """The ranks with the same part of the same weight and the same gradient, in a list for each."""
        return sorted(sorted(some) for by_gradient in self.clusters for some in by_gradient)

    def split(self) -> None:
        """Take ranks with the same weight, but different gradients, for holders of different parameters."""
        self.is_split = True
        self.clusters = [[some] for some in self.gradients()]

    def norms(self) -> Iterator[float]:
        """The norm of each gradient that is there, once."""
        for ranks in self.gradients():
            norm = self.holders[ranks[0]].norm
            if norm is not None:
                yield norm

    def counted(self, connected: frozenset[int]) -> Iterator[float]:
        """The norms that a call joins on ranks that it connects."""
        for unit in self._units:
            if not unit.isdisjoint(connected):
                of_unit = [self.holders[rank] for rank in sorted(unit, reverse=True)]
                yield from {held.part: held.norm for held in of_unit if held.norm is not None}.values()

    def _by_gradient(self, ranks: Sequence[int]) -> list[list[int]]:
        found: list[list[int]] = []
        for rank in ranks:
            same = (some for some in found if self._is_same(rank, some[0]))
            first = next(same, None)
            if first is None:
                found.append([rank])
            else:
                first.append(rank)
        return found

    def _is_same(self, rank: int, other: int) -> bool:
        a, b = self.holders[rank], self.holders[other]
        if a.norm is None or b.norm is None:
            return a.norm is b.norm
        return are_close((a.norm, b.norm), (a.projections, b.projections))


def parameters_of(of_ranks: Sequence[Facts]) -> dict[str, Parameter]:
    """The parameters of all ranks by name."""
    names = dict.fromkeys(name for facts in of_ranks for name in facts.held)
    holders = {name: {r: f.held[name] for r, f in enumerate(of_ranks) if name in f.held} for name in names}
    found = {name: Parameter(of_name, len(of_ranks)) for name, of_name in holders.items()}
    for each in _starting_alike(found):
        each.split()
    return found


def _starting_alike(parameters: dict[str, Parameter]) -> list[Parameter]:
    """Parameters that start alike where others of the same module differ, such as the biases of experts.

    Their gradients differ between the same ranks as those of the others.
    """
    places = {name: (name.rpartition(".")[0], str(each.gradients())) for name, each in parameters.items()}
    differing = {place for name, place in places.items() if parameters[name].has_different_weights}
    return [
        each
        for name, each in parameters.items()
        if "." in name and not each.has_different_weights and places[name] in differing
    ]


def joint(norms: Iterable[float]) -> float:
    """The 2-norm of all from the norms of parts."""
    return math.hypot(*norms)


class Choice(NamedTuple):
    """What a call could get as its `group`.

    Attributes:
        groups: for each process group its description, and its ranks by the rank that passes it.
        connected: the ranks that they connect.
    """

    groups: Sequence[tuple[str, dict[int, Ranks]]]
    connected: Connected

    def is_right(self, pattern: Pattern) -> bool:
        """Whether the call then counts each part of a parameter once on every rank."""
        return all(
            sum(not unit.isdisjoint(ranks) for unit in units) == 1
            for ranks in set(self.connected)
            for units in pattern
        )


def choice(groups: Sequence[tuple[str, dict[int, Ranks]]], ranks: int) -> Choice:
    """What process groups connect, one after the other; a rank may be outside of them."""
    connected = []
    for rank in range(ranks):
        found = {rank}
        for _, group in groups:
            found |= {other for each in found for other in group.get(each, ())}
        connected.append(frozenset(found))
    return Choice(groups, connected)


def passed(of_ranks: Sequence[Facts]) -> Choice:
    """What the ranks pass to the call."""
    count = max(len(facts.passed) for facts in of_ranks)
    groups = [{r: f.passed[i] for r, f in enumerate(of_ranks) if i < len(f.passed)} for i in range(count)]
    return choice([("", group) for group in groups], len(of_ranks))


def choices(of_ranks: Sequence[Facts]) -> list[Choice]:
    """What a call could get as its `group`: nothing, a process group that exists, or two that cross."""
    ranks = len(of_ranks)
    families: dict[tuple[str, int], dict[int, Ranks]] = {}
    for rank, facts in enumerate(of_ranks):
        counts: Counter[str] = Counter()
        for description, group in facts.groups:
            families.setdefault((description, counts[description]), {})[rank] = group
            counts[description] += 1
    # Groups with a name come first, and those of all ranks last.
    order = sorted(families, key=lambda key: (ranks in map(len, families[key].values()), key[0] in UNNAMED))
    existing = [(key[0], families[key]) for key in order]
    crossing = [
        choice([(a, first), (b, second)], ranks)
        for (a, first), (b, second) in combinations(existing, 2)
        if _cross(first, second)
    ]
    return [choice([], ranks), *(choice([each], ranks) for each in existing), *crossing]


def _cross(first: dict[int, Ranks], second: dict[int, Ranks]) -> bool:
    """Whether any two ranks are connected in only one way."""
    return all(set(group) & set(second.get(rank, ())) <= {rank} for rank, group in first.items())
