"""So many standard deviations above the mean of the last norms."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchclip._core import arguments, native
from torchclip.thresholds import checks
from torchclip.thresholds.each import Each, present
from torchclip.thresholds.windowed import Windowed

__all__ = ["RollingSigma"]


class RollingSigma:
    r"""So many standard deviations above the mean of the last norms: what is above is a spike.

    Over the last ``window`` norms that were no spikes, ``W``, before the current one:

        max_norm = mean(W) + sigma · std(W)

    with the standard deviation that divides by one less than the number of norms.  It is meant to skip steps
    by: ``Clipper(optimizer, 1.0, skip_above=RollingSigma())``.  As a ``max_norm`` it clips spikes and leaves
    all other steps alone.

    A norm above the threshold, or one that is not finite, does not enter the window.  So norms that rise for
    good stay above it: skipping has ``max_skips`` for that; to clip by, ``ZScore`` follows them.

    OLMo's training code skips steps by this rule, applied to the loss and to the norm of the gradients; here
    it is applied to the norm alone.  In OLMo's code the norms of skipped steps enter the window, too.  And it
    judges from half a window on, the current step included, where ``warmup`` counts the norms before it.

    Twin: ``torchclip.reference.rolling_sigma_thresholds``.

    Args:
        sigma: how many standard deviations above the mean a norm is a spike, at least 0.
        window: how many of the latest norms count, at least 2.
        warmup: so many norms are only learned from at first, at least 2; these steps have no threshold.

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

    def __init__(self, sigma: float = 6.0, window: int = 128, warmup: int = 64) -> None:
        self.sigma = checks.finite("sigma", sigma, text=True)
        self.window = arguments.count("window", window, least=2)
        self.warmup = arguments.count("warmup", warmup, least=2)
        self._seen = 0
        self._norms: deque[float] = deque(maxlen=self.window)

    def update(self, norm: float) -> float:
        """Judge ``norm`` by those before it, learn from it if it is no spike, and return the threshold."""
        norm = checks.norm(norm)
        max_norm = math.inf if self._seen < self.warmup else self._limit()
        if norm <= max_norm and math.isfinite(norm):
            self._norms.append(norm)
            self._seen += 1
        return max_norm

    def _limit(self) -> float:
        count = len(self._norms)
        mean = sum(norm / count for norm in self._norms)
        return mean + self.sigma * math.dist(self._norms, [mean] * count) / math.sqrt(count - 1)

    def each(self, states: Sequence[Mapping[str, Any]], device: torch.device) -> Each:
        """The tensor form of several of these, which go on from the given states."""
        return _RollingSigmas(self, states, device)

    def state_dict(self) -> dict[str, Any]:
        """The window, as plain data."""
        return _state(self.window, self._seen, list(self._norms))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``; the arguments stay those of this object.

        Raises:
            TypeError: if ``state`` or a part of it is of a wrong type.
            ValueError: if ``state`` is that of another kind of threshold or of another ``window``.
        """
        self._seen, norms = checks.window_of(state, "RollingSigma", self.window, repr(self))
        self._norms = deque(norms, maxlen=self.window)

    def __repr__(self) -> str:
        return f"RollingSigma(sigma={self.sigma}, window={self.window}, warmup={self.warmup})"


def _state(window: int, seen: int, norms: list[float]) -> dict[str, Any]:
    return {"kind": "RollingSigma", "window": window, "seen": seen, "norms": norms}


class _RollingSigmas(Windowed):
    """``RollingSigma`` for many norms at once, formula by formula."""

    _empty = 0.0

    def __init__(self, rule: RollingSigma, states: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        super().__init__(rule.window, states, device)
        self._rule = rule
        self._number = torch.arange(rule.window, device=device)
        self._parts = torch.empty_like(self._slots)

    def update(self, norms: Tensor, norm_type: float) -> Tensor:
        if self.device.type == "cpu" and native.active():
            max_norms = torch.empty_like(norms)
            native.extension.rolling_sigmas(
                norms, max_norms, self._seen, self._slots, self._rule.sigma, self._rule.warmup
            )
            return max_norms
        max_norms = self._limits()
        if self._warming_up:
            max_norms = torch.where(self._seen < self._rule.warmup, math.inf, max_norms)
            if self.device.type == "cpu":
                self._warming_up = bool((self._seen < max(self._rule.warmup, self._rule.window)).any())
        self._put(norms, present(norms) & (norms <= max_norms))
        return max_norms

    def _limits(self) -> Tensor:
        count = self._seen.clamp(max=self._window)
        mean = (self._slots.sum(dim=1) / count).unsqueeze(1)
        # In memory of its own, as making some for each step would take longer than the sum.
        if self._parts.shape != self._slots.shape:
            self._parts = torch.empty_like(self._slots)
        parts = torch.sub(self._slots, mean, out=self._parts)
        if self._warming_up:
            parts.masked_fill_(self._number >= count.unsqueeze(1), 0.0)
        # A tensor, in the warm-up and after it: the last digit of its square root may differ from Python's.
        divisor = (count - 1).clamp(min=1).to(parts.dtype).sqrt()
        std: Tensor = torch.linalg.vector_norm(parts, dim=1) / divisor
        return mean.squeeze(1) + self._rule.sigma * std

    def states(self) -> list[dict[str, Any]]:
        return [_state(self._window, seen, norms) for seen, norms in self._rows()]
