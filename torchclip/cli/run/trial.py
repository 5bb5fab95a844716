"""The clipping that a user tries in one run, instead of the program's own."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torchclip.clipper.clipper import Nonfinite


@dataclass(frozen=True)
class Trial:
    """The clipping that the options of ``torchclip run`` describe.

    Attributes:
        max_norm: a threshold, or a ceiling for one that learns; None if not given.
        threshold: the name of a learned threshold, or None.
        nonfinite: what to do about steps that are not finite; None for the usual.
        none: whether to clip nothing.
        replaced: the program's own ways of clipping that it replaced, and how often.
    """

    max_norm: float | None = None
    threshold: str | None = None
    nonfinite: Nonfinite | None = None
    none: bool = False
    replaced: Counter[str] = field(default_factory=Counter, compare=False)

    @property
    def replaces(self) -> bool:
        """Whether it replaces the program's own thresholds."""
        return self.none or self.max_norm is not None or self.threshold is not None

    @property
    def clips(self) -> bool:
        """Whether each optimizer gets a Clipper."""
        return not self.none and (self.replaces or self.nonfinite is not None)

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
