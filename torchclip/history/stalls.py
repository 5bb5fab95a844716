"""Gradients that clipping has made so small that an optimizer's ``eps`` makes its steps small."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from torchclip._core import gather, joint_norms, scalars
from torchclip.history.layers import Layers
from torchclip.history.records import Record

_FIRST = 7  # the number of the first step that is measured
_MOST_APART = 512  # steps between samples; the first ones are closer
_NEVER = 2**62
"""A step number that no training reaches."""
_JOINT = "all"
_WORTH_A_WORD = 0.05


class _EpsSet(NamedTuple):
    """Parameters with the ``eps`` that their optimizer adds to the size of their gradients.

    The size is the root mean square of a parameter group's gradient; for Muon, the norm of a matrix.
    """

    name: str
    eps: float
    parameters: Sequence[Tensor]
    is_matrix: bool


def _eps_sets(optimizers: Iterable[Any]) -> Iterator[_EpsSet]:
    """All such parameters of some optimizers, without groups that have no ``eps``."""
    optimizers = list(optimizers)
    kinds = [type(optimizer).__name__ for optimizer in optimizers]
    for i, optimizer in enumerate(optimizers):
        kind = kinds[i] if kinds.count(kinds[i]) == 1 else f"optimizer {i} ({kinds[i]})"
        for number, group in enumerate(optimizer.param_groups):
            eps = group.get("eps")
            if not isinstance(eps, (int, float)) or not eps > 0:
                continue
            called = kind if len(optimizer.param_groups) == 1 else f"group {number} of {kind}"
            if "muon" not in kind.lower() or not group.get("use_muon", True):
                yield _EpsSet(called, float(eps), group["params"], False)
                continue
            names = dict(enumerate(group.get("param_names", ())))
            for j, parameter in enumerate(group["params"]):
                yield _EpsSet(f"{names.get(j, f'parameter {j}')} of {called}", float(eps), [parameter], True)


class ClippedSizes:
    """The size of clipped gradients, compared with each ``eps`` of some optimizers, in a few of the steps.

    Attributes:
        next_step: the number of the step to measure next.
    """

    def __init__(self) -> None:
        self.next_step = _FIRST
        self._samples = Layers()
        self._eps: dict[str, float] = {}
        self._matrices: set[str] = set()

    def measure(self, step: int, optimizers: Iterable[Any]) -> None:
        """Measure the gradients of optimizers after clipping, without waiting for a device or other ranks."""
        optimizers = list(optimizers)
        sets = list(_eps_sets(optimizers))
        self.next_step = step + min(step + 1, _MOST_APART) if sets else _NEVER
        parameters = [p for each in optimizers for group in each.param_groups for p in group["params"]]
        grads = gather.distinct_gradients(parameters)
        if not sets or not grads:
            return
        local = gather.local_gradients(parameters)
        norms = local.norms(2.0)
        place_of = {id(grad): place for place, grad in enumerate(grads)}
        sizes = [joint_norms.join(norms, 2.0)]
        for each in sets:
            places = [place_of[id(grad)] for grad in gather.distinct_gradients(each.parameters)]
            norm = joint_norms.join(scalars.at(norms, places), 2.0)
            elements = 1 if each.is_matrix else sum(local.all[place].numel() for place in places)
            sizes.append(norm / math.sqrt(max(elements, 1)))
        self._eps = {each.name: each.eps for each in sets}
        self._matrices = {each.name for each in sets if each.is_matrix}
        self._samples.append(step, [_JOINT, *self._eps], scalars.in_one(sizes))

    def stall(self, records: Sequence[Record]) -> Stall:
        """How many steps stall, by the nearest sample to each."""
        names, steps, sizes = self._samples.read()
        usable = np.isfinite(sizes).all(axis=1) & (sizes[:, 0] > 0) if steps else np.zeros(0, dtype=bool)
        if not records or not usable.any():
            return Stall()
        at, sizes = np.asarray(steps)[usable], sizes[usable]
        # Steps whose norm is not finite do not count.
        norms = np.array([0.0 if r.nonfinite else r.total_norm * r.clip_coef for r in records])
        norm_of = {record.step: norm for record, norm in zip(records, norms, strict=True)}
        nearest = np.searchsorted((at[1:] + at[:-1]) / 2, [record.step for record in records])
        found = sizes[nearest, 1:]
        # If each step has one coefficient for all gradients, sizes change with the norm after clipping.  With
        # several thresholds, or other ranks with other parts, only the sample itself is known.
        if all(
            math.isclose(norm_of.get(step, joint), joint, rel_tol=0.01)
            for step, joint in zip(at, sizes[:, 0], strict=True)
        ):
            found = found / sizes[nearest, :1] * norms[:, None]
        eps = np.array([self._eps.get(name, 0.0) for name in names[1:]])
        clipped = np.array([record.clipped and not record.nonfinite for record in records])
        below = clipped[:, None] & (found > 0) & (found < eps)
        if not below.any():
            return Stall()
        worst = int(np.argmax(below.sum(axis=0)))
        name, size = names[1 + worst], float(np.median(found[below[:, worst], worst]))
        return Stall(
            float(below.any(axis=1).mean()),
            size,
            self._eps[name],
            name if len(self._eps) > 1 else "",
            name in self._matrices,
        )


@dataclass(frozen=True)
class Stall:
    """How many of a run's steps are stalled; ``str()`` says it in words.

    Attributes:
        share: the share of steps in which clipped gradients are below ``eps``.
        size: their median root mean square; for Muon the median norm of a matrix.
        eps: the ``eps``.
        name: whose gradients these are, if not everyone's; those of most steps if there are several.
        is_matrix: whether they are those of a matrix that Muon trains.
    """

    share: float = 0.0
    size: float = 0.0
    eps: float = 0.0
    name: str = ""
    is_matrix: bool = False

    @property
    def matters(self) -> bool:
        """Whether it is worth mentioning."""
        return self.share >= _WORTH_A_WORD

    def __str__(self) -> str:
        of = f" of {self.name}" if self.name else ""
        what = "norm" if self.is_matrix else "root mean square"
        return (
            f"in {self.share:.0%} of the steps the clipped gradients{of} have a {what} of about "
            f"{self.size:.2g}, below the optimizer's eps={self.eps:g}, so these steps change hardly anything"
        )
