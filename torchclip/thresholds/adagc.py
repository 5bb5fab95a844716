"""AdaGC: a threshold for each parameter, relative to the norms that its gradient usually has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torchclip._core import arguments, scalars
from torchclip.thresholds import checks
from torchclip.thresholds.forms import FLOATS
from torchclip.thresholds.learned import Learned

__all__ = ["AdaGC"]


class AdaGC(Learned):
    r"""Clip each parameter's gradient relative to a running mean of its own norm: AdaGC.

    Parameter ``i`` with the gradient ``g_i`` has its own mean ``γ_i``.  In the warm-up all gradients
    together are clipped to ``max_norm``, and ``γ_i`` becomes the smallest norm so far:

        ĝ_i = min(max_norm / ‖g‖, 1) g_i              γ_i ← min(γ_i, ‖ĝ_i‖)

    with ``‖g‖`` the joint norm, and ``γ_i = ‖ĝ_i‖`` at the first step.  After it each is clipped by its own:

        ĝ_i = min(relative γ_i / ‖g_i‖, 1) g_i        γ_i ← beta γ_i + (1 - beta) ‖ĝ_i‖

    With it, a ``Clipper`` takes the norm of each parameter, whatever its ``scope``; for a DTensor,
    that of the whole parameter.  It skips parameters of a group with its own ``max_norm``.

    What the paper leaves open, or where implementations disagree:

    - In the authors' code the first ``warmup`` steps are clipped together, the same for all parameters; in
      other code it is one step fewer. Here ``warmup`` is the number of norms from which each parameter
      learns, so a parameter that is frozen at first has its warm-up later. In the authors' code it would
      start from its first norm, without a warm-up.
    - In the warm-up, the joint norm is the one of all gradients, as in the paper and the authors' code; some
      implementations take that of each gradient there, too.
    - The authors' code has ``relative=1.04`` and ``beta=0.99`` for GPT-2. It adds a small constant to the
      denominators. Here nothing is divided by a norm of 0, so there is none.
    - A norm of 0 is not learned from. By the formula ``γ_i`` would be 0 forever, and the parameter would not
      move again: LoRA's ``A`` is an example, whose first gradient is 0 as ``B`` still is.
    - A norm that is not finite is not learned from. In the warm-up it does not count in ``‖g‖``, and is
      clipped to ``max_norm``.

    Twin: ``torchclip.reference.adagc_thresholds``.

    Args:
        relative: the largest norm, in terms of ``γ_i`` (``λ_rel`` in the paper), at least 0.
        beta: how much of ``γ_i`` is kept each step, between 0 and 1.
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

    _columns = ("_gamma", "_seen")

    per_parameter = True
    """Tells a ``Clipper`` to take a norm for each parameter."""

    def __init__(
        self, relative: float = 1.05, beta: float = 0.98, warmup: int = 100, max_norm: float = 1.0
    ) -> None:
        self.relative = checks.finite("relative", relative, text=True)
        self.beta = checks.between("beta", beta, 1)
        self.warmup = arguments.count("warmup", warmup, least=1)
        self.max_norm = arguments.threshold("max_norm", max_norm)
        self._seen = 0
        self._gamma = math.inf  # until the first norm

    def update(self, norm: float, total_norm: float | None = None) -> float:
        """Learn from ``norm`` and return the threshold of this step.

        Args:
            norm: the norm of the parameter's gradient.
            total_norm: the joint norm of all gradients, which counts in the warm-up; by default ``norm``.
        """
        norm = checks.norm(norm)
        joint = norm if total_norm is None else total_norm
        max_norm: float = self._learn_beside(norm, joint, FLOATS)
        return max_norm

    def _learn(self, norms: Any, form: Any, order: float = 2.0) -> Any:
        joint: Any = 0.0
        if form.any(self._seen < self.warmup):
            finite = (norms >= 0) & (norms < math.inf)
            joint = form.join(form.where(finite, norms, scalars.ABSENT), order)
        return self._learn_beside(norms, joint, form)

    def _learn_beside(self, norms: Any, total_norm: Any, form: Any) -> Any:
        gamma, seen, where = self._gamma, self._seen, form.where
        warming_up = seen < self.warmup
        jointly = where(
            norms < math.inf, scalars.clip_coef(self.max_norm, total_norm, 0.0) * norms, self.max_norm
        )
        max_norms = where(warming_up, jointly, self.relative * gamma)
        learn = (norms > 0) & (norms < math.inf)
        clipped = where(norms < max_norms, norms, max_norms)
        smallest = where(clipped < gamma, clipped, gamma)
        mean = self.beta * gamma + (1 - self.beta) * clipped
        self._gamma = where(learn, where(warming_up, smallest, mean), gamma)
        self._seen = where(learn & warming_up, seen + 1, seen)
        return max_norms

    def state_dict(self) -> dict[str, Any]:
        """The running mean, and how many norms of the warm-up it has seen, as plain data."""
        gamma = None if math.isinf(self._gamma) else self._gamma
        return {"kind": "AdaGC", "gamma": gamma, "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``; the arguments stay those of this object.

        Raises:
            TypeError: if ``state`` or a part of it is of a wrong type.
            ValueError: if ``state`` is that of another kind of threshold.
        """
        checks.state_of(state, "AdaGC", ("gamma", "seen"))
        gamma = math.inf if state["gamma"] is None else checks.finite("state['gamma']", state["gamma"])
        self._seen = arguments.count("state['seen']", state["seen"], least=0)
        self._gamma = gamma

    def __repr__(self) -> str:
        return (
            f"AdaGC(relative={self.relative}, beta={self.beta}, warmup={self.warmup}, "
            f"max_norm={self.max_norm})"
        )
