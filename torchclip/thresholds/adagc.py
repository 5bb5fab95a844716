"""AdaGC: a threshold for each parameter, relative to the usual norm of its gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torchclip._core import arguments, scalars
from torchclip.thresholds import checks
from torchclip.thresholds.forms import FLOATS
from torchclip.thresholds.learned import Learned


@dataclass(eq=False)
class AdaGC(Learned):
    r"""Clip each parameter's gradient relative to a running mean of its own norm: AdaGC.

    Parameter ``i`` with the gradient ``g_i`` has its own mean ``γ_i``.  In the warm-up all gradients
    together are clipped to ``max_norm``, and ``γ_i`` becomes the smallest norm so far:

        ĝ_i = min(max_norm / ‖g‖, 1) g_i              γ_i ← min(γ_i, ‖ĝ_i‖)

    ``‖g‖`` is the joint norm, and ``γ_i = ‖ĝ_i‖`` in the first step.  After the warm-up each gradient is
    clipped by its own threshold:

        ĝ_i = min(relative γ_i / ‖g_i‖, 1) g_i        γ_i ← beta γ_i + (1 - beta) ‖ĝ_i‖

    A ``Clipper`` with this threshold measures the norm of each parameter, whatever its ``scope``; for a
    DTensor, that of the full parameter.  AdaGC does not apply to groups with their own ``max_norm``.

    Where the paper is not specific, or implementations differ:

    - In the authors' code, the warm-up is the first ``warmup`` steps of the run, for all parameters; in other
      code it is one step shorter. Here ``warmup`` is the number of norms from which each parameter learns. So
      a parameter that is frozen at first has its warm-up later. In the authors' code it would have none.
    - In the warm-up, ``‖g‖`` is the norm of all gradients, as in the paper and the authors' code. Some
      implementations use each gradient's own norm.
    - The authors' code has ``relative=1.04`` and ``beta=0.99`` for GPT-2. It adds a small constant to the
      denominators. Here no denominator can be 0, so there is no constant.
    - AdaGC does not learn from a norm of 0. By the formula ``γ_i`` would stay 0, and the parameter would not
      move again. An example is LoRA's ``A``, whose first gradient is 0 because ``B`` is 0.
    - AdaGC does not learn from a norm that is not finite. In the warm-up a norm that is not finite does not
      count in ``‖g‖``, and its gradient is clipped to ``max_norm``.

    Twin: ``torchclip.reference.adagc_thresholds``.

    Args:
        relative: the largest allowed norm, as a multiple of ``γ_i`` (``λ_rel`` in the paper), at least 0.
        beta: the weight of the old ``γ_i`` in each step, between 0 and 1.
        warmup: the number of norms from which each parameter first learns, at least 1.
        max_norm: the threshold for all gradients together in the warm-up (``λ_abs`` in the paper).

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if an argument is out of its range.

    References:
        Wang et al., *AdaGC: Improving Training Stability for Large Language Model Pretraining*, 2025,
        https://arxiv.org/abs/2502.11034 (in later versions *AdaGC: Enhancing LLM Pretraining Stability via
        Adaptive Gradient Clipping*), and the authors' code, https://github.com/lishuai-97/AdaGC

    Examples:
        >>> threshold = AdaGC(relative=1.5, beta=0.5, warmup=2, max_norm=4.0)
        >>> [threshold.update(norm) for norm in [2.0, 8.0, 100.0]]
        [2.0, 4.0, 3.0]
    """

    _kind = "AdaGC"
    _columns = ("_gamma", "_seen")

    _per_parameter: ClassVar[bool] = True
    """Tells a ``Clipper`` to measure the norm of each parameter."""

    relative: float = 1.05
    beta: float = 0.98
    warmup: int = 100
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        self.relative = checks.finite("relative", self.relative, text=True)
        self.beta = checks.between("beta", self.beta, 1)
        self.warmup = arguments.count("warmup", self.warmup, least=1)
        self.max_norm = arguments.threshold("max_norm", self.max_norm)
        self._seen = 0
        self._gamma = math.inf  # until the first norm

    def update(self, norm: float, total_norm: float | None = None) -> float:
        """Learn from ``norm`` and return the threshold of this step.

        Args:
            norm: the norm of the parameter's gradient.
            total_norm: the joint norm of all gradients, which counts in the warm-up; by default ``norm``.
        """
        max_norm: float = self._learn(checks.norm(norm), FLOATS, total_norm=total_norm)
        return max_norm

    def _learn(self, norms: Any, form: Any, order: float = 2.0, total_norm: float | None = None) -> Any:
        gamma, seen, where = self._gamma, self._seen, form.where
        warming_up = seen < self.warmup
        learn, max_norms = (norms > 0.0) & (norms < math.inf), self.relative * gamma
        in_warmup = form.any(warming_up)  # after the warm-up, some of the work is not needed
        if in_warmup:
            finite = (norms >= 0.0) & (norms < math.inf)
            joint: Any = total_norm
            if joint is None:
                joint = form.join(where(finite, norms, scalars.ABSENT), order)
            jointly = where(finite, scalars.clip_coef(self.max_norm, joint, 0.0) * norms, self.max_norm)
            max_norms = where(warming_up, jointly, max_norms)
        clipped = form.minimum(norms, max_norms)
        learned = self.beta * gamma + (1 - self.beta) * clipped
        if in_warmup:
            learned = where(warming_up, form.minimum(clipped, gamma), learned)
            self._seen = where(learn & warming_up, seen + 1, seen)
        self._gamma = where(learn, learned, gamma)
        return max_norms

    def _state(self) -> dict[str, Any]:
        return {"gamma": None if math.isinf(self._gamma) else self._gamma, "seen": self._seen}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._require(state, "gamma", "seen")
        gamma = math.inf if state["gamma"] is None else checks.finite("state['gamma']", state["gamma"])
        self._seen = arguments.count("state['seen']", state["seen"], least=0)
        self._gamma = gamma
