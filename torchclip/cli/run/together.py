"""Optimizers that step together, on the gradients of the same backward passes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torchclip.cli.run.optimizer import OptimizerRecord
from torchclip.history.history import History
from torchclip.history.records import Record

__all__ = ["joint_history", "together"]

_SHARE = 0.9  # the required share of the rounds of the optimizer that steps less often


def together(optimizers: Sequence[OptimizerRecord]) -> list[list[OptimizerRecord]]:
    """Optimizers that step after the same backward passes, each with its own Clipper or with none."""
    groups: list[list[OptimizerRecord]] = []
    for each in optimizers:
        for group in groups:
            rounds, others = _numbers(each), _numbers(group[0])
            least = max(_SHARE * min(len(rounds), len(others)), 1)
            if each.history is not group[0].history and len(rounds & others) >= least:
                group.append(each)
                break
        else:
            groups.append([each])
    return [group for group in groups if len(group) > 1]


def _numbers(optimizer: OptimizerRecord) -> set[int]:
    """How many backward passes there were before its steps, apart from those before the first."""
    return {backwards for _, backwards in optimizer.rounds if backwards}


def joint_history(optimizers: Sequence[OptimizerRecord]) -> History:
    """Their joint steps: the norm of all gradients of a backward pass, as a single call would measure it."""
    rounds: dict[int, list[Record]] = {}
    for each in optimizers:
        round_of = dict(each.rounds)
        for record in each.history:
            if round_of.get(record.step):
                rounds.setdefault(round_of[record.step], []).append(record)
    joint = History()
    for step, parts in enumerate(rounds[number] for number in sorted(rounds)):
        norms = {(part.total_norm, part.max_norm) for part in parts}
        # A call that clipped all of them also measured all of them.
        is_one_call = len(norms) == 1 and math.isfinite(parts[0].max_norm)
        norm = parts[0].total_norm if is_one_call else math.hypot(*(part.total_norm for part in parts))
        losses = [part.loss for part in parts if part.loss is not None]
        joint.append(
            step,
            norm,
            min(part.max_norm for part in parts),
            min(part.clip_coef for part in parts),
            all(part.skipped for part in parts),
            losses[0] if losses else None,
        )
    return joint
