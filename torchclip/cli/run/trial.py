"""The clipping that a user tries for one run, in place of the program's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch.optim import Optimizer

from torchclip.cli.thresholds import max_norm_of
from torchclip.clipper.clipper import Clipper, Nonfinite
from torchclip.thresholds.base import MaxNorm

__all__ = ["Trial"]


@dataclass(frozen=True)
class Trial:
    """What the options of ``torchclip run`` ask for.

    Attributes:
        max_norm: a threshold, or a ceiling for one that learns; None if not given.
        threshold: the name of one that learns, or None.
        nonfinite: what to do about steps that are not finite, or None for what is usual.
        none: whether nothing is to be clipped.
    """

    max_norm: float | None = None
    threshold: str | None = None
    nonfinite: Nonfinite | None = None
    none: bool = False

    @property
    def replaces(self) -> bool:
        """Whether the thresholds of the program's own clipping count no more."""
        return self.none or self.max_norm is not None or self.threshold is not None

    @property
    def clips(self) -> bool:
        """Whether each optimizer gets a Clipper."""
        return not self.none and (self.replaces or self.nonfinite is not None)

    @property
    def is_per_parameter(self) -> bool:
        """Whether each parameter has a threshold of its own."""
        return self.threshold == "adagc"

    def new_max_norm(self) -> MaxNorm:
        """What a Clipper gets as ``max_norm``."""
        ceiling = math.inf if self.max_norm is None else self.max_norm
        return max_norm_of(self.threshold or "fixed", ceiling)

    def clipper_for(self, optimizer: Optimizer | Sequence[Optimizer]) -> Clipper:
        """A Clipper on an optimizer that has none, or on several that step together."""
        return Clipper(optimizer, self.new_max_norm(), nonfinite=self.nonfinite or "propagate")

    def __str__(self) -> str:
        if self.none:
            return "nothing was clipped (--none)"
        options = {"max-norm": self.max_norm, "threshold": self.threshold, "nonfinite": self.nonfinite}
        given = " ".join(
            f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"
            for name, value in options.items()
            if value is not None
        )
        return f"clipped by {given}"
