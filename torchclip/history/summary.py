"""A run in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass

QUANTILES = (0.1, 0.5, 0.9, 0.99)
"""The probabilities of the quantiles in a summary."""


@dataclass(frozen=True)
class Summary:
    """A run in a few numbers; ``str()`` prints them in two lines, or three if steps were clipped.

    Counts and the largest norm are over all steps, quantiles over the last ``kept`` steps.  A step with
    several records counts once: as clipped, non-finite or skipped if any of them is.
    """

    steps: int
    clipped: int
    nonfinite: int
    skipped: int
    largest_norm: float
    """The largest finite norm; ``nan`` if there is none."""
    largest_step: int | None
    """The step with the largest norm; the first one if there are several."""
    kept: int
    quantiles: dict[float, float]
    """Quantiles of the finite norms before clipping of the kept steps, by probability; empty without any."""
    clipped_quantiles: dict[float, float]
    """The same of the norms after clipping."""

    @property
    def clipped_share(self) -> float:
        """The share of clipped steps; 0 without steps."""
        return self.clipped / self.steps if self.steps else 0.0

    def __str__(self) -> str:
        counts = (
            f"{self.steps:,} steps: {self.clipped:,} clipped ({self.clipped_share:.1%}), "
            f"{self.nonfinite:,} non-finite, {self.skipped:,} skipped"
        )
        if not self.quantiles:
            return f"{counts}\nnorm: none finite among the steps kept"
        where = "" if self.kept == self.steps else f" (last {self.kept:,} steps)"
        largest = f"largest {self.largest_norm:.4g} at step {self.largest_step}"
        text = f"{counts}\nnorm: {_listed(self.quantiles)}{where}; {largest}"
        if self.clipped_quantiles == self.quantiles:
            return text
        return f"{text}\nafter clipping: {_listed(self.clipped_quantiles)}"


def _listed(quantiles: dict[float, float]) -> str:
    return ", ".join(f"{q:.0%} {norm:.4g}" for q, norm in quantiles.items())
