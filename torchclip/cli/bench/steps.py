"""What clipping adds to a training step: the rows of ``torchclip bench``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchclip.cli.bench import loop
from torchclip.cli.bench.timing import progress

__all__ = ["TITLES", "StepRow", "how", "label", "measure_steps"]

TITLES = {"mlp": "MLP 17-64-64-6", "layers": "24 layers of 32"}

StepRow = dict[str, Any]


def measure_steps(rounds: int) -> list[StepRow]:
    """What each contender adds to a step, in seconds, and how many times less than torch that is.

    Args:
        rounds: how often each contender takes its turn.
    """
    rows = [
        loop.Row(model, optimizer, clips)
        for model in loop.MODELS
        for optimizer in loop.OPTIMIZERS
        for clips in (False, True)
    ]
    found = []
    with progress(len(rows)) as begin:
        for row in rows:
            facts: StepRow = {"model": row.model, "title": TITLES[row.model], "optimizer": row.optimizer}
            facts["clips"] = row.clips
            begin(label(facts))
            times = loop.measure(row, rounds=rounds)
            facts["added"], facts["drift"] = loop.added(times), loop.drifts(times)
            facts["speedup"] = loop.speedups(facts["added"])
            found.append(facts)
    return found


def label(row: Mapping[str, Any]) -> str:
    """The name of a row: the model, the optimizer, and whether gradients are clipped."""
    return f"{row['title']}, {how(row)}"


def how(row: Mapping[str, Any]) -> str:
    """The optimizer, and whether gradients are clipped."""
    return f"{row['optimizer']}, {'clipping' if row['clips'] else 'not needed'}"
