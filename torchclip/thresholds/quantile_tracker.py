"""A threshold for per-example clipping that follows a quantile of the examples' norms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchclip._core import arguments
from torchclip.thresholds import checks
from torchclip.thresholds.learned import Saved


@dataclass(eq=False)
class QuantileTracker(Saved):
    r"""A threshold for ``clip_per_example`` that leaves a given share of the examples unclipped.

    After each step, ``share`` is the share of the batch's examples that were not clipped:

        max_norm ← max_norm · exp(-lr (share - quantile))

    The tracker sees only this share and no norms, which costs little privacy.  For differential privacy, add
    the paper's noise to the share, and count both releases in the accounting.  This class does neither.

    Twin: ``torchclip.reference.quantile_tracker_thresholds``.

    Args:
        quantile: the share of examples to leave unclipped, between 0 and 1.
        lr: how fast the threshold moves, at least 0.
        max_norm: the first threshold, above 0 and finite. Start too small rather than too large: the
            threshold grows by a factor of up to ``exp(lr · quantile)`` in each step.

    Attributes:
        max_norm (float): the threshold to clip the next batch to.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if an argument is out of its range.

    References:
        Andrew, Thakkar, McMahan and Ramaswamy, *Differentially Private Learning with Adaptive Clipping*,
        2021, https://arxiv.org/abs/1905.03871

    Examples:
        >>> import torch, torchclip
        >>> tracker = QuantileTracker(quantile=0.5, lr=0.2, max_norm=0.1)
        >>> grads = [torch.tensor([[3.0, 4.0], [0.03, 0.04], [0.3, 0.4], [0.6, 0.8]])]
        >>> sums, clipped = torchclip.clip_per_example(grads, tracker.max_norm)
        >>> round(tracker.update(1 - clipped / 4), 4)  # too many were clipped
        0.1051
    """

    _kind = "QuantileTracker"

    quantile: float = 0.5
    lr: float = 0.2
    max_norm: float = 0.1

    def __post_init__(self) -> None:
        self.quantile = checks.between("quantile", self.quantile, 1)
        self.lr = checks.finite("lr", self.lr, text=True)
        self.max_norm = _positive("max_norm", self.max_norm, text=True)

    def update(self, share: float | Tensor) -> float:
        """Adapt the threshold to the last batch, and return it.

        Args:
            share: the share of examples that were not clipped, ``1 - clipped / len(examples)``, with the
                ``clipped`` of ``clip_per_example``.  With noise, it may be below 0 or above 1.
        """
        unclipped = arguments.number("share", share)
        if not math.isfinite(unclipped):
            raise ValueError(f"`share` must be finite, got {arguments.shown(share)}")
        # It stays within the range of float64, so that the threshold can always recover.
        exponent = math.log(self.max_norm) - self.lr * (unclipped - self.quantile)
        self.max_norm = math.exp(min(max(exponent, -700.0), 700.0))
        return self.max_norm

    def _state(self) -> dict[str, Any]:
        return {"max_norm": self.max_norm}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._require(state, "max_norm")
        self.max_norm = _positive("state['max_norm']", state["max_norm"])


def _positive(name: str, value: Any, text: bool = False) -> float:
    number = checks.finite(name, value, text)
    if number == 0:
        raise ValueError(f"`{name}` must be above 0, as multiplication never changes 0, got {number}")
    return number
