"""The thresholds that options offer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torchclip
from torchclip.cli.options import refusal
from torchclip.thresholds.base import MaxNorm, Threshold

__all__ = ["CLASSES", "DESCRIBED", "LEARNED", "check_ceiling", "max_norm_of"]

CLASSES: dict[str, Callable[..., Threshold]] = {
    "percentile": torchclip.Percentile,
    "zscore": torchclip.ZScore,
    "adagc": torchclip.AdaGC,
    "rolling-sigma": torchclip.RollingSigma,
}
"""The thresholds that learn from the norms."""

LEARNED = {
    "percentile": "the 10th percentile of the norms so far (AutoClip)",
    "zscore": "above the usual norm, so that only spikes are clipped (ZClip)",
    "adagc": "the usual norm of each parameter (AdaGC)",
    "rolling-sigma": "mean plus six standard deviations of the last norms",
}
"""The threshold of each, in words."""

WITHOUT_CEILING = {name for name, of in CLASSES.items() if "max_norm" not in inspect.signature(of).parameters}
"""Those that take no ``max_norm``."""


DESCRIBED = "; ".join(f"{name}: {what}" for name, what in LEARNED.items())
"""All of them in one line, for an option's help."""


def check_ceiling(threshold: str | None, max_norm: float | None) -> None:
    """Raise an error for a ``--max-norm`` with a threshold that does not use it."""
    if threshold in WITHOUT_CEILING and max_norm is not None:
        raise refusal(f"--max-norm has no meaning with --threshold {threshold}")


def max_norm_of(threshold: str, max_norm: float = math.inf) -> MaxNorm:
    """The ``max_norm`` of a Clipper: a new object in each call.

    Args:
        threshold: ``"fixed"`` or a name in ``LEARNED``.
        max_norm: the fixed threshold, or a ceiling for one that learns; for AdaGC, that of its warm-up.
    """
    if threshold == "fixed":
        return max_norm
    return CLASSES[threshold](**({} if math.isinf(max_norm) else {"max_norm": max_norm}))
