"""ZClip: pull back the norms that are far above their running mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from torchclip._core import arguments
from torchclip.thresholds import checks
from torchclip.thresholds.each import Each, floats, integers, present

__all__ = ["ZScore"]

ClipOption = Literal["adaptive_scaling", "mean", "percentile"]


class ZScore:
    r"""Pull back the steps whose norm is far above its running mean: ZClip.

    A norm ``g`` is a spike if its z-score against the mean ``μ`` and standard deviation ``σ`` of the steps
    before it is above the threshold: ``z = (g - μ) / σ > z*``.  A spike is clipped to ``g*``, which depends
    on ``clip_option``:

        "adaptive_scaling":   g* = μ + (z*² / z) σ      the larger the spike, the closer to the mean
        "mean":               g* = μ
        "percentile":         g* = μ + z* σ             the largest norm that is no spike

    Other steps are not clipped: their threshold is ``μ + z* σ``.  Then ``μ`` and ``σ`` learn from the step, a
    spike counting with ``g*`` in place of ``g``:

        μ ← α μ + (1 - α) g          σ² ← α σ² + (1 - α) (g - μ)²

    They start as the mean and the standard deviation of the norms of the warm-up.  A norm that is not finite
    gets ``μ + z* σ`` and is not learned from.  The ceiling ``max_norm`` limits the answer only: what is
    learned does not depend on it.

    Two things differ from the authors' code.  It has a ceiling by default, ``max_grad_norm=1.0``, to which
    every step is clipped, spike or not; here the ceiling is ``inf`` unless you set one, so pass
    ``max_norm=1.0`` for the same.  And it adds a small constant to ``σ`` against division by zero; here no
    division can meet a zero, so there is none, and norms scaled by a factor get thresholds scaled by that
    factor.

    Twin: ``torchclip.reference.zscore_thresholds``.

    Args:
        alpha: ``α``, how much of the mean and variance is kept each step, between 0 and 1.
        threshold: ``z*``, the z-score above which a norm is a spike, at least 0.
        warmup: how many finite norms the mean and variance start from, at least 1; these steps are clipped to
            ``max_norm`` alone.
        clip_option: what spikes are clipped to (above). The authors' code calls the first two options of
            ``mode="zscore"``, and the third a ``mode`` of its own.
        skip_update_on_spike: learn nothing from spikes. If norms rise for good, every step is then a spike
            and the mean never follows.
        max_norm: a hard ceiling for the threshold, in the warm-up too.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if an argument is out of its range, or ``clip_option`` is unknown.

    References:
        Kumar, Owen, Chowdhury and Güra, *ZClip: Adaptive Spike Mitigation for LLM Pre-Training*, 2025,
        https://arxiv.org/abs/2504.02507

    Examples:
        >>> threshold = ZScore(threshold=2.0, warmup=2)
        >>> [threshold.update(norm) for norm in [1.0, 3.0, 10.0]]  # μ = 2, σ = 1, so z = 8
        [inf, inf, 2.5]
    """

    def __init__(
        self,
        alpha: float = 0.97,
        threshold: float = 2.5,
        warmup: int = 25,
        clip_option: ClipOption = "adaptive_scaling",
        skip_update_on_spike: bool = False,
        max_norm: float = math.inf,
    ) -> None:
        self.alpha = checks.between("alpha", alpha, 1)
        self.threshold = arguments.threshold("threshold", threshold)
        if math.isinf(self.threshold):
            raise ValueError(
                "`threshold` is inf, so no step would be clipped; pass a finite z-score such as 2.5"
            )
        self.warmup = arguments.count("warmup", warmup, least=1)
        self.clip_option: ClipOption = arguments.option("clip_option", clip_option, get_args(ClipOption))
        self.skip_update_on_spike = arguments.flag("skip_update_on_spike", skip_update_on_spike)
        self.max_norm = arguments.threshold("max_norm", max_norm)
        self._warmup_norms: list[float] = []
        self._mean: float | None = None  # None until the warm-up is over
        # The deviation, not the variance: squares of large norms would overflow.
        self._std = 0.0

    def update(self, norm: float) -> float:
        """Judge ``norm`` by the steps before it, learn from it, and return the threshold of this step."""
        norm = checks.norm(norm)
        if self._mean is None:
            if math.isfinite(norm):
                self._warm_up(norm)
            return self.max_norm
        mean, margin = self._mean, self.threshold * self._std
        max_norm = mean + margin
        if math.isfinite(norm):
            spike = norm > max_norm
            if spike:
                max_norm = norm = self._pulled_back(norm, mean, margin)
            if not (spike and self.skip_update_on_spike):
                self._learn(norm, mean)
        return min(max_norm, self.max_norm)

    def _pulled_back(self, norm: float, mean: float, margin: float) -> float:
        if self.clip_option == "adaptive_scaling":
            # z*²/z · σ, written without squares; norm - mean is above margin, hence above 0.
            return mean + margin * (margin / (norm - mean))
        return mean if self.clip_option == "mean" else mean + margin

    def _learn(self, norm: float, mean: float) -> None:
        self._mean = self.alpha * mean + (1 - self.alpha) * norm
        self._std = math.hypot(
            math.sqrt(self.alpha) * self._std, math.sqrt(1 - self.alpha) * (norm - self._mean)
        )

    def _warm_up(self, norm: float) -> None:
        self._warmup_norms.append(norm)
        self._end_warm_up()

    def _end_warm_up(self) -> None:
        norms = self._warmup_norms
        if self._mean is None and len(norms) >= self.warmup:
            self._mean = mean = sum(n / len(norms) for n in norms)
            self._std = math.hypot(*[(n - mean) / math.sqrt(len(norms)) for n in norms])
            self._warmup_norms = []

    def state_dict(self) -> dict[str, Any]:
        """The mean and standard deviation, or the norms of an unfinished warm-up, as plain data."""
        return _state(self._mean, self._std, list(self._warmup_norms))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``; the arguments stay those of this object.

        Raises:
            TypeError: if ``state`` or a part of it is of a wrong type.
            ValueError: if ``state`` is that of another kind of threshold.
        """
        checks.state_of(state, "ZScore", ("mean", "std", "warmup_norms"))
        mean = None if state["mean"] is None else checks.finite("state['mean']", state["mean"])
        # Version 0.1.0 saved a NaN as the deviation before the warm-up was over.
        unknown = mean is None and state["std"] != state["std"]
        std = 0.0 if unknown else checks.finite("state['std']", state["std"])
        norms = arguments.items("state['warmup_norms']", state["warmup_norms"], checks.finite)
        self._mean, self._std, self._warmup_norms = mean, std, norms
        self._end_warm_up()

    def each(self, states: Sequence[Mapping[str, Any]], device: torch.device) -> Each:
        """The tensor form of several of these, which go on from the given states."""
        return _ZScores(self, states, device)

    def __repr__(self) -> str:
        return (
            f"ZScore(alpha={self.alpha}, threshold={self.threshold}, warmup={self.warmup}, "
            f"clip_option={self.clip_option!r}, skip_update_on_spike={self.skip_update_on_spike}, "
            f"max_norm={self.max_norm})"
        )


def _state(mean: float | None, std: float, warmup_norms: list[float]) -> dict[str, Any]:
    return {"kind": "ZScore", "mean": mean, "std": std, "warmup_norms": warmup_norms}


class _ZScores(Each):
    """``ZScore`` for many norms at once, formula by formula."""

    columns = ("_mean", "_std", "_seen", "_first")

    def __init__(self, rule: ZScore, states: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        self._rule = rule
        means = [math.nan if state["mean"] is None else state["mean"] for state in states]
        self._mean = floats(means, device)  # NaN until the warm-up is over
        self._std = floats([state["std"] for state in states], device)
        first = [state["warmup_norms"] for state in states]
        unknown = [[math.nan] * (rule.warmup - len(norms)) for norms in first]
        rows = [[*norms, *rest] for norms, rest in zip(first, unknown, strict=True)]
        self._first = floats(rows, device).reshape(len(rows), rule.warmup)
        seen = [len(s["warmup_norms"]) if s["mean"] is None else rule.warmup for s in states]
        self._seen = integers(seen, device)

    def update(self, norms: Tensor, norm_type: float) -> Tensor:
        rule, mean, std = self._rule, self._mean, self._std
        margin = rule.threshold * std
        max_norms = mean + margin
        learn = present(norms)
        spike = (norms > max_norms) & learn
        max_norms = torch.where(spike, self._pulled_back(norms, mean, margin, max_norms), max_norms)
        if rule.skip_update_on_spike:
            learn = learn & ~spike
        learned = torch.minimum(norms, max_norms)
        new_mean = rule.alpha * mean + (1 - rule.alpha) * learned
        new_std = torch.hypot(math.sqrt(rule.alpha) * std, math.sqrt(1 - rule.alpha) * (learned - new_mean))
        # In the warm-up the mean is NaN, and with it all of these; the deviation is still 0.
        self._mean = torch.where(learn, new_mean, mean)
        self._std = torch.where(learn & ~mean.isnan(), new_std, std)
        if self._warming_up:
            max_norms = max_norms.nan_to_num(nan=math.inf)
            self._warm_up(norms)
        return max_norms.clamp(max=rule.max_norm)

    def _pulled_back(self, norms: Tensor, mean: Tensor, margin: Tensor, limit: Tensor) -> Tensor:
        if self._rule.clip_option == "adaptive_scaling":
            return mean + margin * (margin / (norms - mean))
        return mean if self._rule.clip_option == "mean" else limit

    def _warm_up(self, norms: Tensor) -> None:
        warmup = self._rule.warmup
        learn = present(norms) & (self._seen < warmup)
        slot = self._seen.clamp(max=warmup - 1).unsqueeze(1)
        learned = torch.where(learn.unsqueeze(1), norms.unsqueeze(1), self._first.gather(1, slot))
        self._first.scatter_(1, slot, learned)
        self._seen += learn
        mean = (self._first / warmup).sum(dim=1)
        parts = (self._first - mean.unsqueeze(1)) / math.sqrt(warmup)
        # Divided by the largest, no square leaves the range.
        largest = parts.abs().amax(dim=1, keepdim=True)
        parts = parts / torch.where(largest > 0, largest, 1.0)
        std = largest.squeeze(1) * parts.square().sum(dim=1).sqrt()
        is_over = learn & (self._seen == warmup)
        self._mean = torch.where(is_over, mean, self._mean)
        self._std = torch.where(is_over, std, self._std)
        if self.device.type == "cpu":
            self._warming_up = bool((self._seen < warmup).any())

    def states(self) -> list[dict[str, Any]]:
        rows = zip(*(getattr(self, name).tolist() for name in self.columns), strict=True)
        return [
            _state(None, std, first[:seen]) if math.isnan(mean) else _state(mean, std, [])
            for mean, std, seen, first in rows
        ]
