"""Gradients that clipping has made so small that an optimizer's ``eps`` stands in the way of its steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from torchclip.history.records import Record

__all__ = ["EpsLimit", "Stall", "eps_limits", "stalled"]


class EpsLimit(NamedTuple):
    """A parameter group's ``eps``, and how many elements the gradient has whose size it is added to.

    An optimizer such as Adam divides by the root mean square of each element; Muon by the norm of a matrix,
    for which ``elements`` is 1.
    """

    eps: float
    elements: int

    @property
    def norm(self) -> float:
        """The norm below which the root mean square is below ``eps``."""
        return self.eps * math.sqrt(self.elements)


def eps_limits(optimizers: Iterable[Any]) -> tuple[EpsLimit, ...]:
    """The limits of optimizers' parameter groups; of groups without ``eps`` there is none."""
    found = []
    for optimizer in optimizers:
        is_muon = "muon" in type(optimizer).__name__.lower()
        for group in optimizer.param_groups:
            eps = group.get("eps")
            if isinstance(eps, (int, float)) and eps > 0:
                elements = 1 if is_muon else sum(parameter.numel() for parameter in group["params"])
                found.append(EpsLimit(float(eps), max(elements, 1)))
    return tuple(found)


@dataclass(frozen=True)
class Stall:
    """How many of a run's steps are stalled; ``str()`` says it in words.

    Attributes:
        share: the share of steps whose clipped gradients are below ``eps``.
        size: their median root mean square.
        eps: the ``eps``.
    """

    share: float = 0.0
    size: float = 0.0
    eps: float = 0.0

    def __str__(self) -> str:
        return (
            f"Stalled: in {self.share:.0%} of the steps the clipped gradients have a root mean square of "
            f"about {self.size:.2g}, below the optimizer's eps={self.eps:g}, so they move hardly anything. "
            f"Raise max_norm, or lower eps below {self.size:.0g}."
        )


def stalled(records: Sequence[Record], limits: Sequence[EpsLimit]) -> Stall:
    """How many steps stall, judging by the norm of all gradients, which is at least that of each group."""
    if not records or not limits:
        return Stall()
    limit = max(limits, key=lambda each: each.norm)
    clipped = np.array(
        [r.total_norm * r.clip_coef if r.clipped and not r.nonfinite else math.inf for r in records]
    )
    below = (clipped > 0) & (clipped < limit.norm)
    if not below.any():
        return Stall()
    size = float(np.median(clipped[below])) / math.sqrt(limit.elements)
    return Stall(float(below.mean()), size, limit.eps)
