"""How far steps move each parameter, compared with its norm, in some of the steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from torchclip._core import arguments

_MOST, _LEAST = 1e-1, 1e-6
"""Updates beyond these shares of the weights are too large, or too small."""
_SAMPLES = 5
_SHOWN = 3


class Update(NamedTuple):
    """How far a step moved a parameter."""

    step: int
    """The step's number."""
    weight: float
    """The norm of the parameter before the step."""
    update: float
    """The norm of what the step added to it."""
    ratio: float
    """``update / weight``; ``inf`` for a change of a parameter that was 0, and 0 without a change."""


def updates_note(updates: Mapping[str, Sequence[Update]], first: int) -> Iterator[str]:
    """Which parameters move too far for good, or hardly at all, from step number ``first`` on."""
    for is_wrong, words, remedy in (
        (lambda ratio: ratio > _MOST, "more than a tenth of its norm", "lower its learning rate"),
        (
            lambda ratio: ratio < _LEAST,
            "less than a millionth of its norm",
            "raise its learning rate, or keep it in a wider dtype",
        ),
    ):
        found = {}
        for name, every in updates.items():
            ratio = [each.ratio for each in every if each.step >= first and each.weight and each.update]
            # Its last samples, at least half of them, show that it does not pass.
            lately = ratio[len(ratio) // 2 :]
            if len(ratio) >= _SAMPLES and all(map(is_wrong, lately)):
                found[name] = float(np.median(lately))
        if found:
            shown = arguments.some([f"{name} ({ratio:.2g})" for name, ratio in found.items()], _SHOWN)
            yield f"Updates: each step moves {shown} by {words}: {remedy}."
