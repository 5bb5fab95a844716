"""ZClip: clip the norms that are far above their running mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torchclip._core import arguments
from torchclip.thresholds import checks
from torchclip.thresholds.learned import Learned

ClipOption = Literal["adaptive_scaling", "mean", "percentile"]


@dataclass(eq=False)
class ZScore(Learned):
    r"""Clip the steps whose norm is far above its running mean: ZClip.

    A norm ``g`` is a spike if its z-score is above the threshold: ``z = (g - μ) / σ > z*``, with the mean
    ``μ`` and the standard deviation ``σ`` of the steps before.  A spike is clipped to ``g*``, which depends
    on ``clip_option``:

        "adaptive_scaling":   g* = μ + (z*² / z) σ      the larger the spike, the closer to the mean
        "mean":               g* = μ
        "percentile":         g* = μ + z* σ             the largest norm that is not a spike

    Other steps are not clipped: their threshold is ``μ + z* σ``.  Then ``μ`` and ``σ`` learn from the step;
    for a spike, ``g*`` replaces ``g``:

        μ ← α μ + (1 - α) g          σ² ← α σ² + (1 - α) (g - μ)²

    ``μ`` and ``σ`` start as the mean and the standard deviation of the norms of the warm-up.  The threshold
    for a norm that is not finite is ``μ + z* σ``, and nothing is learned from it.  The ceiling ``max_norm``
    limits only the threshold; what is learned does not depend on it.

    Two things differ from the authors' code.  Their code has a ceiling by default, ``max_grad_norm=1.0``, and
    clips every step to it, spike or not.  Here the ceiling is ``inf`` by default; pass ``max_norm=1.0`` to
    get theirs.  Their code also adds a small constant to ``σ`` to avoid a division by zero.  Here no division
    by zero can occur, so there is no constant, and norms scaled by a factor give thresholds scaled by that
    factor.

    Twin: ``torchclip.reference.zscore_thresholds``.

    Args:
        alpha: ``α``, the weight of the old mean and variance in each step, between 0 and 1.
        threshold: ``z*``, the z-score above which a norm is a spike, at least 0.
        warmup: the number of finite norms in the warm-up, at least 1. In the warm-up steps are clipped to
            ``max_norm`` alone.
        clip_option: what spikes are clipped to (see above). In the authors' code the first two are options of
            ``mode="zscore"``, and the third is another ``mode``.
        skip_update_on_spike: whether to learn nothing from spikes. Then, if norms rise and stay high, every
            step is a spike, and the mean never follows.
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

    _kind = "ZScore"
    _columns = ("_mean", "_std", "_seen")

    alpha: float = 0.97
    threshold: float = 2.5
    warmup: int = 25
    clip_option: ClipOption = "adaptive_scaling"
    skip_update_on_spike: bool = False
    max_norm: float = math.inf

    def __post_init__(self) -> None:
        self.alpha = checks.between("alpha", self.alpha, 1)
        self.threshold = arguments.threshold("threshold", self.threshold)
        if math.isinf(self.threshold):
            raise ValueError(
                "`threshold` is inf, so no step would be clipped; pass a finite z-score such as 2.5"
            )
        self.warmup = arguments.count("warmup", self.warmup, least=1)
        arguments.option("clip_option", self.clip_option, get_args(ClipOption))
        self.skip_update_on_spike = arguments.flag("skip_update_on_spike", self.skip_update_on_spike)
        self.max_norm = arguments.threshold("max_norm", self.max_norm)
        self._mean = 0.0
        # The deviation, not the variance, because squares of large norms would overflow.
        self._std = 0.0
        self._seen = 0.0  # finite norms in the warm-up

    def _learn(self, norms: Any, form: Any, order: float = 2.0) -> Any:
        mean, std, seen, where = self._mean, self._std, self._seen, form.where
        warming_up = seen < self.warmup
        in_warmup = form.any(warming_up)
        margin = self.threshold * std
        max_norms = mean + margin
        learn = (norms >= 0.0) & (norms < math.inf)
        learned = norms
        spike = learn & (norms > max_norms)
        if in_warmup:
            spike = spike & (seen >= self.warmup)
        if form.any(spike):
            max_norms = where(spike, self._pulled_back(norms, mean, margin, spike, where), max_norms)
            learned = where(spike, max_norms, norms)
            if self.skip_update_on_spike:
                learn = learn != spike  # a spike is always a norm to learn from
        rate = 1.0 - self.alpha
        kept = 1.0 - rate
        weight = rate * (kept * kept)
        if in_warmup:  # in the warm-up all norms weigh the same, later the last ones weigh more
            rate = where(warming_up, 1.0 / (seen + 1.0), rate)
            kept = 1.0 - rate
            weight = where(warming_up, rate * kept, weight)
            self._seen = where(learn & warming_up, seen + 1.0, seen)
            max_norms = where(warming_up, math.inf, max_norms)
        offset = form.sqrt(weight) * (learned - mean)
        self._mean = where(learn, kept * mean + rate * learned, mean)
        self._std = where(learn, form.hypot(form.sqrt(kept) * std, offset), std)
        if self.max_norm < math.inf:
            max_norms = where(max_norms < self.max_norm, max_norms, self.max_norm)
        return max_norms

    def _pulled_back(self, norms: Any, mean: Any, margin: Any, spike: Any, where: Any) -> Any:
        if self.clip_option == "adaptive_scaling":
            # z*²/z · σ, written without squares; a norm above mean + margin is above the mean, too.
            return mean + margin * (margin / where(spike, norms - mean, 1.0))
        return mean if self.clip_option == "mean" else mean + margin

    def _state(self) -> dict[str, Any]:
        return {"mean": self._mean, "std": self._std, "seen": int(self._seen)}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._require(state, "mean", "std", "seen")
        mean = checks.finite("state['mean']", state["mean"])
        std = checks.finite("state['std']", state["std"])
        self._seen = float(arguments.count("state['seen']", state["seen"], least=0))
        self._mean, self._std = mean, std
