"""Optimizers that step together, on the gradients of the same backward passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torchclip.cli.run.optimizer import OptimizerRecord
from torchclip.history.history import History
from torchclip.history.records import Record

_SHARE = 0.9  # the required share of the rounds of the optimizer that steps less often


def joint_histories(optimizers: Mapping[str, OptimizerRecord]) -> dict[str, History]:
    """The joint steps of optimizers that step after the same backward passes.

    Args:
        optimizers: optimizers with histories of their own, by their labels.

    Returns:
        The histories, by the labels of their optimizers.
    """
    groups: list[dict[str, OptimizerRecord]] = []
    for label, each in optimizers.items():
        for group in groups:
            rounds, others = _numbers(each), _numbers(next(iter(group.values())))
            if len(rounds & others) >= max(_SHARE * min(len(rounds), len(others)), 1):
                group[label] = each
                break
        else:
            groups.append({label: each})
    return {" and ".join(group): _joined([*group.values()]) for group in groups if len(group) > 1}


def _numbers(optimizer: OptimizerRecord) -> set[int]:
    """How many backward passes there were before its steps, apart from those before the first."""
    return {backwards for _, backwards in optimizer.rounds if backwards}


def _joined(optimizers: Sequence[OptimizerRecord]) -> History:
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
