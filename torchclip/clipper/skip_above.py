"""Steps that are skipped because their norm or loss is above a limit, and how many were so in a row."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from torchclip._core import arguments, scalars
from torchclip._core.batch import Norm, Norms
from torchclip.thresholds.bank import ThresholdBank
from torchclip.thresholds.base import MaxNorm

_NAMES = ["all"]


class InARow:
    """How many steps in a row were skipped for one reason.

    Args:
        most: how many may be, or None for any number.

    Attributes:
        count: the number up to the last step that has ended; on a device if the host does not know it.
        then: the number when the current step has ended.
    """

    def __init__(self, most: int | None) -> None:
        self.most = math.inf if most is None else most
        self.count: int | Tensor = 0
        self.then: int | Tensor = 0
        self._on_its_way: tuple[Any, Tensor] | None = None

    def begin_step(self) -> None:
        """Begin a step, which changes nothing unless it is added."""
        self.then = self.count

    def add(self, skipped: bool | Tensor, is_other: bool | Tensor) -> None:
        """Count the current step if it is skipped, else start anew; another kind of step changes nothing."""
        if skipped is False and is_other is False:  # most steps
            self.then = 0
        else:
            self.then = scalars.where(is_other, self.count, scalars.where(skipped, self.count + 1, 0))

    def end(self) -> None:
        """End the current step."""
        self.count = count = self.then
        if isinstance(count, Tensor) and self.most < math.inf and self._on_its_way is None:
            there, arrived = count.to("cpu", non_blocking=True), None
            if not count.is_cpu:
                arrived = torch.get_device_module(count.device).Event()
                arrived.record()
            self._on_its_way = arrived, there

    def is_full(self) -> bool:
        """Whether as many steps as allowed were skipped; for a device, as far as is known without a wait."""
        if not isinstance(self.count, Tensor):
            return self.count >= self.most
        arrived, there = self._on_its_way or (None, None)
        if there is None or not (arrived is None or arrived.query()):
            return False
        self._on_its_way = None
        # A later step may have started anew, which is worth waiting for.
        return int(there) >= self.most and int(self.count) >= self.most

    def load(self, count: int) -> None:
        """Continue from a number."""
        self.count, self.then, self._on_its_way = count, count, None


class SkipAbove:
    """Decides which steps are skipped because their norm, or their loss, is above a limit.

    Args:
        limit: anything that ``max_norm`` may be.
        max_skips: how many steps in a row are skipped at most; None for any number.
        norm_type: the order of the norms.
        judged: what is judged, ``"norm"`` or ``"loss"``.

    Attributes:
        bank: the limit.
        skips: how many steps in a row were skipped.
        argument: the name of the Clipper's argument.
        max_norm: the limit for a step that is taken because too many in a row were skipped, and is clipped to
            it; infinite for any other step, and if losses are judged.
        clip_coef: the largest allowed clip coefficient of the step: below 1 for such a one.
    """

    def __init__(self, limit: MaxNorm, max_skips: int | None, norm_type: float, judged: str = "norm") -> None:
        self.argument = "skip_above" if judged == "norm" else "skip_loss_above"
        self.bank = ThresholdBank(limit, self.argument)
        self._judged = judged
        self.skips = InARow(max_skips)
        self._norm_type = norm_type
        self._warned = False
        self.max_norm: Norm = math.inf
        self.clip_coef: Norm = 1.0

    def should_skip(self, norm: Norm, step: int) -> bool | Tensor:
        """Whether the step with this norm, or loss, and number is skipped."""
        skips, finite_most = self.skips, self.skips.most < math.inf
        norms: Norms = [norm] if isinstance(norm, float) else norm.reshape(1)
        limits = self.bank.max_norms(_NAMES, norms, self._norm_type, step)
        limit = limits if isinstance(limits, float) else limits[0]
        is_above: bool | Tensor = norm > limit
        # A norm that is not finite does not count in the row, and cannot be clipped: such a step is never
        # taken.
        is_nonfinite = (norm == math.inf) | (norm != norm)
        skip = is_above & ((skips.count < skips.most) | is_nonfinite) if finite_most else is_above
        skips.add(skip, is_nonfinite)
        if finite_most and self._judged == "norm":
            self.max_norm = scalars.where(is_above, scalars.in_one([limit, norm])[0], math.inf)
            self.clip_coef = scalars.where(is_above, scalars.clip_coef(limit, norm, 0.0), 1.0)
        if is_above is True and skip is False and not self._warned:
            self._warn(step, limit, norm)
        return skip

    def _warn(self, step: int, limit: Norm, norm: Norm) -> None:
        self._warned = True
        clipped = f", clipped to {limit:.4g}," if self._judged == "norm" else ""
        warnings.warn(
            f"step {step} was taken{clipped} though its {self._judged} is {norm:.4g}: "
            f"{self.skips.count} steps in a row were skipped, as many as `max_skips` allows. If it has risen "
            f"and stays high, raise `{self.argument}`, or do not pass it",
            stacklevel=arguments.level_of_caller(),
        )
