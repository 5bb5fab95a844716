"""Optimizers that step together, on the gradients of the same backward passes."""

from __future__ import annotations

import gc
import math
from collections.abc import Container, Sequence
from weakref import ref

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from torchclip.cli.run.optimizer import OptimizerRecord
from torchclip.clipper.checked import takes_hooks
from torchclip.history.history import History
from torchclip.history.records import Record

__all__ = ["OpenRound", "companions", "joint_history", "together"]

_SHARE = 0.9  # the required share of the rounds of the optimizer that steps less often


def companions(optimizer: Optimizer, known: Container[int]) -> list[Optimizer]:
    """Other optimizers that have gradients and have never stepped, and so probably step with this one.

    Args:
        optimizer: the optimizer that takes its first step.
        known: the ``id`` of each optimizer that has stepped, or has a Clipper.
    """
    own = {id(parameter) for parameter in _parameters(optimizer)}
    found = []
    for each in gc.get_objects():
        if issubclass(type(each), Optimizer) and takes_hooks(each):
            theirs = _parameters(each)
            # An optimizer that wraps another has the same parameters.
            if each is optimizer or id(each) in known or own & set(map(id, theirs)):
                continue
            if not isinstance(each, LBFGS) and any(parameter.grad is not None for parameter in theirs):
                found.append(each)
                own |= set(map(id, theirs))
    return found


class OpenRound:
    """Which optimizers of one Clipper have stepped with the current gradients."""

    def __init__(self) -> None:
        self._backwards = 0
        self._stepped: dict[int, tuple[ref[Tensor] | None, int]] = {}
        self._optimizers: dict[int, ref[Optimizer]] = {}

    def step(self, optimizer: Optimizer, backwards: int) -> bool:
        """Record a step; False if the optimizer's gradients come from another backward pass than the others'.

        Args:
            optimizer: the optimizer that steps.
            backwards: how many backward passes there have been.
        """
        is_new = not self._stepped or id(optimizer) in self._stepped
        if not is_new and backwards != self._backwards:
            # If one that has stepped also has new gradients, it steps less often than this one.
            if all(_mark(each) == mark for each, mark in self._others()):
                return False
            is_new = True
        if is_new:
            self._backwards, self._stepped, self._optimizers = backwards, {}, {}
        self._optimizers[id(optimizer)] = ref(optimizer)
        self.mark(optimizer)
        return True

    def mark(self, optimizer: Optimizer) -> None:
        """Record the gradients with which an optimizer has stepped."""
        self._stepped[id(optimizer)] = _mark(optimizer)

    def _others(self) -> list[tuple[Optimizer, tuple[ref[Tensor] | None, int]]]:
        alive = [(self._optimizers[key](), mark) for key, mark in self._stepped.items()]
        return [(each, mark) for each, mark in alive if each is not None]


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in getattr(optimizer, "param_groups", ()) for p in group["params"]]


def _mark(optimizer: Optimizer) -> tuple[ref[Tensor] | None, int]:
    """Data that distinguishes a new gradient from an old one."""
    grad = next((p.grad for p in _parameters(optimizer) if p.grad is not None), None)
    return (None, 0) if grad is None else (ref(grad), grad._version)


# The report


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
