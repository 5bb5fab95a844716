"""The clipping that a user tries in one run, instead of the program's own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

import torchclip
from torchclip._core import scalars
from torchclip.cli.run.gradients import Number, norms_of
from torchclip.clip_grad.norm import clip_grads_with_norm_
from torchclip.thresholds.base import MaxNorm, Threshold

CLASSES: dict[str, Callable[..., Threshold]] = {
    "percentile": torchclip.Percentile,
    "zscore": torchclip.ZScore,
    "adagc": torchclip.AdaGC,
    "rolling-sigma": torchclip.RollingSigma,
}
"""The thresholds that options offer, which learn from the norms."""


class Effect(NamedTuple):
    """What clipping did to gradients: the norm before, the threshold, and the clip coefficient."""

    total_norm: Number
    max_norm: float
    clip_coef: Number


@dataclass(frozen=True)
class Trial:
    """The clipping that the options of ``torchclip run`` describe.

    Each call site, with each set of parameters, has its own threshold object, and so has each optimizer that
    the program does not clip.

    Attributes:
        max_norm: a threshold, or a ceiling for one that learns; None if not given.
        threshold: the name of a learned threshold, or None.
        none: whether to clip nothing.
        replaced: the program's own ways of clipping that it replaced, and how often.
    """

    max_norm: float | None = None
    threshold: str | None = None
    none: bool = False
    replaced: Counter[str] = field(default_factory=Counter, compare=False)
    _learned: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def replaces(self) -> bool:
        """Whether it replaces the program's own thresholds."""
        return self.none or self.max_norm is not None or self.threshold is not None

    def new_max_norm(self) -> MaxNorm:
        """The ``max_norm`` for a Clipper that the program makes."""
        if self.threshold is None:
            return math.inf if self.max_norm is None else self.max_norm
        return CLASSES[self.threshold](**({} if self.max_norm is None else {"max_norm": self.max_norm}))

    def clip(
        self,
        place: Hashable,
        parameters: Sequence[Tensor],
        norm: Number,
        grad_scale: Tensor | None = None,
    ) -> Effect:
        """Clip gradients.

        Args:
            place: where this happens; each place learns a threshold of its own.
            parameters: the parameters.
            norm: the norm of their gradients, without a GradScaler's scale.
            grad_scale: the scale by which the optimizer divides while it steps.
        """
        if self.none:
            return Effect(norm, math.inf, 1.0)
        if self.threshold == "adagc":
            return self._clip_each(place, parameters, norm, grad_scale)
        max_norm = math.inf if self.max_norm is None else self.max_norm
        if self.threshold is not None:
            max_norm = self._threshold(place).update(float(norm))
        if max_norm < math.inf:
            clip_grads_with_norm_(parameters, max_norm, norm)
        return Effect(norm, max_norm, scalars.clip_coef(max_norm, norm))

    def _threshold(self, place: Hashable) -> Any:
        return self._learned.setdefault(place, self.new_max_norm())

    def _clip_each(
        self, place: Hashable, parameters: Sequence[Tensor], norm: Number, grad_scale: Tensor | None
    ) -> Effect:
        """Clip each gradient by a threshold of its own."""
        owners, norms = norms_of(parameters)
        norms = norms if grad_scale is None else norms / grad_scale
        max_norms, coefs = [math.inf], [1.0]
        for parameter, own in zip(owners, norms.tolist(), strict=True):
            max_norms.append(self._threshold((place, id(parameter))).update(own, float(norm)))
            coefs.append(scalars.clip_coef(max_norms[-1], own))
            clip_grads_with_norm_(parameter, max_norms[-1], own)
        return Effect(norm, min(max_norms), min(coefs))

    def __str__(self) -> str:
        max_norm = "" if self.max_norm is None else f"--max-norm {self.max_norm:g}"
        threshold = "" if self.threshold is None else f"--threshold {self.threshold}"
        return "--none" if self.none else f"{max_norm} {threshold}".strip()
