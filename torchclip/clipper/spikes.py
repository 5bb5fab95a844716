"""Steps that are skipped because their norm is above a limit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchclip._core import arguments, scalars
from torchclip._core.batch import Norm
from torchclip.thresholds.bank import ThresholdBank
from torchclip.thresholds.base import MaxNorm

_NAME = "all"


class Spikes:
    """Decides which steps are spikes, and how many of them are skipped in a row.

    Args:
        skip_above: the limit: anything that ``max_norm`` may be.
        max_skips: how many steps in a row are skipped at most; None for any number.
        order: the order of the norms.
        in_rounds: whether several optimizers step together.

    Attributes:
        bank: the limit.
        max_norm: the limit for a spike that is taken because too many in a row were skipped, and is clipped
            to it; infinite for any other step.
        clip_coef: the largest allowed clip coefficient of the step: below 1 for such a spike.
    """

    def __init__(self, skip_above: MaxNorm, max_skips: int | None, order: float, in_rounds: bool) -> None:
        self.bank = ThresholdBank(skip_above, "skip_above", in_rounds)
        self._max_skips = math.inf if max_skips is None else arguments.count("max_skips", max_skips, least=1)
        self._order = order
        self._step = 0
        self._limit: Norm | None = None  # of the step, once it is known
        # The number of skipped steps in a row, up to the last step and including the current one.
        self._skips: int | Tensor = 0
        self._skips_then: int | Tensor = 0
        self._warned = False
        self.max_norm: Norm = math.inf
        self.clip_coef: Norm = 1.0

    def begin(self, step: int) -> None:
        """Begin the step of a number, whose limit is asked for once."""
        self._step, self._limit, self.max_norm, self.clip_coef = step, None, math.inf, 1.0
        self._skips_then = self._skips
        self.bank.begin_step(step)

    def should_skip(self, norm: Norm) -> bool | Tensor:
        """Whether the step with this norm is skipped; asked again, by the same limit."""
        if self._limit is None:
            limits = self.bank.max_norms([_NAME], scalars.in_one([norm]), self._order)
            self._limit = limits if isinstance(limits, float) else limits[0]
        limit = self._limit
        is_spike: bool | Tensor = norm > limit
        # A norm that is not finite does not count in the row, and cannot be clipped: such a step is never
        # taken.
        is_nonfinite = (norm == math.inf) | (norm != norm)
        skip = is_spike & ((self._skips < self._max_skips) | is_nonfinite)
        in_a_row = scalars.where(skip, self._skips + 1, 0)
        self._skips_then = scalars.where(is_nonfinite, self._skips, in_a_row)
        if self._max_skips < math.inf:
            self.max_norm = scalars.where(is_spike, scalars.in_one([limit, norm])[0], math.inf)
            self.clip_coef = scalars.where(is_spike, scalars.clip_coef(limit, norm, 0.0), 1.0)
        if is_spike is True and skip is False and not self._warned:
            self._warned = True
            warnings.warn(
                f"step {self._step} was taken, clipped to {limit:.4g}, though its norm is {norm:.4g}: "
                f"{self._skips} steps in a row were skipped, as many as `max_skips` allows. If the norms "
                "have risen and stay high, raise `skip_above`, or do not pass it",
                stacklevel=2,
            )
        return skip

    def end(self) -> None:
        """Count the step, which was skipped or taken."""
        self._skips = self._skips_then

    def state_dict(self, in_round: bool) -> dict[str, Any]:
        """What the limit has learned, and the number of skipped steps in a row; waits for an accelerator.

        Args:
            in_round: whether a round of several optimizers is open, which does not count yet.
        """
        return {"skips": int(self._skips), "thresholds": self.bank.state_dict(in_round)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict``."""
        skips = self.check(state)
        self.bank.load_state_dict(state["thresholds"])
        self._skips = self._skips_then = skips

    def check(self, state: Any) -> int:
        """The number of skips in a state; raises for anything else."""
        arguments.saved("state['spikes']", state, ("skips", "thresholds"), "Clipper")
        arguments.saved("state['spikes']['thresholds']", state["thresholds"], (), "Clipper")
        return arguments.count("state['spikes']['skips']", state["skips"], least=0)
