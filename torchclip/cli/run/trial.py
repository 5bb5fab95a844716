"""The clipping that a user tries in one run, instead of the program's own."""

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
    """The clipping that the options of ``torchclip run`` describe.

    Attributes:
        max_norm: a threshold, or a ceiling for one that learns; None if not given.
        threshold: the name of a learned threshold, or None.
        nonfinite: what to do about steps that are not finite; None for the usual.
        none: whether to clip nothing.
    """

    max_norm: float | None = None
    threshold: str | None = None
    nonfinite: Nonfinite | None = None
    none: bool = False

    @property
    def replaces(self) -> bool:
        """Whether it replaces the program's own thresholds."""
        return self.none or self.max_norm is not None or self.threshold is not None

    @property
    def clips(self) -> bool:
        """Whether each optimizer gets a Clipper."""
        return not self.none and (self.replaces or self.nonfinite is not None)

    @property
    def is_per_parameter(self) -> bool:
        """Whether each parameter has its own threshold."""
        return self.threshold == "adagc"

    def new_max_norm(self) -> MaxNorm:
        """The ``max_norm`` of a Clipper."""
        ceiling = math.inf if self.max_norm is None else self.max_norm
        return max_norm_of(self.threshold or "fixed", ceiling)

    def clipper_for(self, optimizer: Optimizer | Sequence[Optimizer]) -> Clipper:
        """Make a Clipper for an optimizer without one, or for several that step together."""
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
