"""AdaGC: a threshold for each parameter, relative to the norms that its gradient usually has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchclip._core import arguments, scalars
from torchclip.thresholds import checks
from torchclip.thresholds.each import Each, floats, integers, present

__all__ = ["AdaGC"]


class AdaGC:
    r"""Clip each parameter's gradient relative to a running mean of its own norm: AdaGC.

    Parameter ``i`` with the gradient ``g_i`` has a mean ``γ_i`` of its own.  In the warm-up all gradients
    together are clipped to ``max_norm``, and ``γ_i`` becomes the smallest norm so far:

        ĝ_i = min(max_norm / ‖g‖, 1) g_i              γ_i ← min(γ_i, ‖ĝ_i‖)

    with ``‖g‖`` the joint norm, and ``γ_i = ‖ĝ_i‖`` at the first step.  After it each is clipped by its own:

        ĝ_i = min(relative γ_i / ‖g_i‖, 1) g_i        γ_i ← beta γ_i + (1 - beta) ‖ĝ_i‖

    A ``Clipper`` that is given one takes the norm of each parameter, whatever its ``scope``; for a DTensor
    that of the whole parameter.  Parameters of a group with its own ``max_norm`` are left out.

    What the paper leaves open, or where implementations disagree:

    - In the authors' code the first ``warmup`` steps are clipped together, the same for all parameters; in
      other code it is one step fewer. Here ``warmup`` is how many norms each parameter learns from, so that
      one that is frozen at first has its warm-up later; in the authors' code it would start from its first
      norm, and not have one.
    - In the warm-up, the joint norm is the one of all gradients, as in the paper and the authors' code; some
      implementations take that of each gradient there, too.
    - The authors' code has ``relative=1.04`` and ``beta=0.99`` for GPT-2. It adds a small constant to the
      denominators. Here a norm of 0 divides nothing, so there is none.
    - A norm of 0 is not learned from. By the formula ``γ_i`` would be 0 for good, and the parameter would not
      move again: LoRA's ``A`` is an example, whose first gradient is 0 as ``B`` still is.
    - A norm that is not finite is not learned from. In the warm-up it does not count in ``‖g‖``, and is
      clipped to ``max_norm``.

    Twin: ``torchclip.reference.adagc_thresholds``.

    Args:
        relative: the largest norm, in terms of ``γ_i`` (``λ_rel`` in the paper), at least 0.
        beta: how much of ``γ_i`` is kept each step, between 0 and 1.
        warmup: how many norms each parameter first learns from, at least 1.
        max_norm: what all gradients together are clipped to in the warm-up (``λ_abs`` in the paper).

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
            total_norm: the joint norm of all gradients, which counts in the warm-up; ``norm`` if left out.
        """
        norm = checks.norm(norm)
        warming_up = self._seen < self.warmup
        if not warming_up:
            max_norm = self.relative * self._gamma
        elif math.isfinite(norm):
            max_norm = (
                scalars.clip_coef(self.max_norm, norm if total_norm is None else total_norm, 0.0) * norm
            )
        else:
            max_norm = self.max_norm
        if 0 < norm < math.inf:
            clipped = min(norm, max_norm)
            if warming_up:
                self._gamma = min(self._gamma, clipped)
                self._seen += 1
            else:
                self._gamma = self.beta * self._gamma + (1 - self.beta) * clipped
        return max_norm

    def each(self, states: Sequence[Mapping[str, Any]], device: torch.device) -> Each:
        """The tensor form for several parameters, which go on from the given states."""
        return _AdaGCs(self, states, device)

    def state_dict(self) -> dict[str, Any]:
        """The running mean, and how many norms of the warm-up it has seen, as plain data."""
        return _state(self._gamma, self._seen)

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


def _state(gamma: float, seen: int) -> dict[str, Any]:
    return {"kind": "AdaGC", "gamma": None if math.isinf(gamma) else gamma, "seen": seen}


class _AdaGCs(Each):
    """``AdaGC`` for many norms at once, formula by formula."""

    columns = ("_gamma", "_seen")

    def __init__(self, rule: AdaGC, states: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        self._rule = rule
        self._gamma = floats([math.inf if s["gamma"] is None else s["gamma"] for s in states], device)
        self._seen = integers([state["seen"] for state in states], device)

    def update(self, norms: Tensor, norm_type: float) -> Tensor:
        rule = self._rule
        max_norms = rule.relative * self._gamma
        learn = (norms > 0) & (norms < math.inf)
        if self._warming_up:
            warming_up = self._seen < rule.warmup
            max_norms = torch.where(warming_up, self._joint_max_norms(norms, norm_type), max_norms)
            clipped = torch.minimum(norms, max_norms)
            gamma = torch.where(warming_up, torch.minimum(self._gamma, clipped), self._mean(clipped))
            self._seen += learn & warming_up
            if self.device.type == "cpu":
                self._warming_up = bool((self._seen < rule.warmup).any())
        else:
            gamma = self._mean(torch.minimum(norms, max_norms))
        self._gamma = torch.where(learn, gamma, self._gamma)
        return max_norms

    def _mean(self, clipped: Tensor) -> Tensor:
        return self._rule.beta * self._gamma + (1 - self._rule.beta) * clipped

    def _joint_max_norms(self, norms: Tensor, norm_type: float) -> Tensor:
        """What each norm is when all gradients together are clipped."""
        finite = present(norms)
        total_norm = scalars.join_rows(norms.where(finite, scalars.ABSENT), norm_type)
        clip_coef = scalars.clip_coef(self._rule.max_norm, total_norm, 0.0)
        return torch.where(finite, clip_coef * norms, self._rule.max_norm)

    def states(self) -> list[dict[str, Any]]:
        rows = zip(self._gamma.tolist(), self._seen.tolist(), strict=True)
        return [_state(gamma, seen) for gamma, seen in rows]
