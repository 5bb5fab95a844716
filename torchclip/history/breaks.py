"""Between which parameters a backward pass stopped being finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from numpy.typing import NDArray


def where_it_broke(finite: Sequence[tuple[str, bool]]) -> str:
    """Where a backward pass stopped being finite, in a sentence.

    Args:
        finite: the name of each parameter that has a gradient, in the order of ``named_parameters()``, and
            whether the gradient is finite.
    """
    bad = [place for place, (_, is_finite) in enumerate(finite) if not is_finite]
    if not bad:
        return ""
    if len(bad) == len(finite):
        return "No gradient is finite: look at the loss."
    last = finite[bad[-1]][0]
    if bad[-1] == len(finite) - 1:
        return (
            f"{last}, the last parameter of the model, is not finite: look at what follows it, and the loss."
        )
    return (
        f"In the order of the model, {last} is the last parameter with a non-finite gradient, and that "
        f"of the next one, {finite[bad[-1] + 1][0]}, is finite: look at what the model computes between them."
    )


def breaks_note(
    names: Sequence[str], steps: Sequence[int], norms: NDArray[Any], in_model_order: bool
) -> Iterator[str]:
    """Where the first sampled step that is not finite broke; nothing if the names may be in another order."""
    if not in_model_order:
        return
    for step, of_step in zip(steps, norms.tolist(), strict=True):
        finite = [(name, math.isfinite(norm)) for name, norm in zip(names, of_step, strict=True) if norm != 0]
        if sentence := where_it_broke(finite):
            yield f"Step {step:,}: {sentence}"
            return
