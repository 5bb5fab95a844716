"""A threshold some standard deviations above the mean of the last norms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchclip._core import arguments
from torchclip.thresholds import checks
from torchclip.thresholds.learned import Learned
from torchclip.thresholds.window import in_order, in_slots


@dataclass(eq=False)
class RollingSigma(Learned):
    r"""The mean of the last norms plus some standard deviations: norms above it are spikes.

    ``W`` are the last ``window`` norms before the current one that were not spikes:

        max_norm = mean(W) + sigma · std(W)

    The standard deviation divides by one less than the number of norms.  The threshold is meant for skipping
    steps: ``Clipper(optimizer, 1.0, skip_above=RollingSigma())``, or by the loss with ``skip_loss_above``.
    As a ``max_norm`` it clips only spikes.

    A norm above the threshold, or one that is not finite, does not enter the window.  So norms that rise and
    stay high remain above the threshold.  To skip steps, pass ``max_skips`` as well.  To clip, use
    ``ZScore``, which follows the norms.

    OLMo's training code skips steps by this rule, applied to the loss and to the norm of the gradients.  In
    OLMo's code the norms of skipped steps enter the window, too.  Its warm-up is half a window, including the
    current step; here ``warmup`` counts the norms before the current step.

    Twin: ``torchclip.reference.rolling_sigma_thresholds``.

    Args:
        sigma: the number of standard deviations above the mean at which spikes begin, at least 0.
        window: the number of latest norms that count, at least 2.
        warmup: the number of norms in the warm-up, which has no threshold; at least 2.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if an argument is out of its range.

    References:
        OLMo team, *2 OLMo 2 Furious*, 2025, https://arxiv.org/abs/2501.00656, and the class
        ``SkipStepOptimizer`` of https://github.com/allenai/OLMo-core

    Examples:
        >>> threshold = RollingSigma(sigma=2.0, warmup=3)
        >>> [threshold.update(norm) for norm in [1.0, 2.0, 3.0, 100.0, 2.0]]  # mean 2, deviation 1
        [inf, inf, inf, 4.0, 4.0]
    """

    _kind = "RollingSigma"
    _columns = ("_seen", "_slots")

    sigma: float = 6.0
    window: int = 128
    warmup: int = 64

    def __post_init__(self) -> None:
        self.sigma = checks.finite("sigma", self.sigma, text=True)
        self.window = arguments.count("window", self.window, least=2)
        self.warmup = arguments.count("warmup", self.warmup, least=2)
        self._seen = 0
        # Norm number i is in slot i % window, so that a resumed run adds the norms in the same order.
        self._slots = [math.nan] * self.window

    def _learn(self, norms: Any, form: Any, order: float = 2.0) -> Any:
        seen, where = self._seen, form.where
        mean, deviation = form.mean_and_deviation(self._slots, seen)
        max_norms = where(seen < self.warmup, math.inf, mean + self.sigma * deviation)
        learn = (norms >= 0.0) & (norms < math.inf) & (norms <= max_norms)
        self._slots = form.put(self._slots, seen % self.window, norms, learn)
        self._seen = seen + learn
        return max_norms

    def _state(self) -> dict[str, Any]:
        return {"window": self.window, "seen": self._seen, "norms": in_order(self._slots, self._seen)}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._seen, norms = checks.window_of(state, self._kind, self.window, repr(self))
        self._slots = in_slots(norms, self._seen, self.window)
