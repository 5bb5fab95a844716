"""What else a run shows, in a sentence or two each."""

from __future__ import annotations

import math

import numpy as np

from torchclip.history.run import MUCH, Run, counted
from torchclip.history.signs import Departure, harmful, usual_level
from torchclip.history.stalls import Stall

CONVERGES = 100
"""A run converges if its last norms are this many times smaller than its first ones."""


def notes(run: Run, stall: Stall) -> list[tuple[str, bool]]:
    """What there is to say, and whether it comes before the advice where there is no verdict."""
    much = MUCH * len(run.norms)
    found = [
        (_about_nonfinite(run), run.departure is not None or run.nonfinite >= much),
        (_about_departure(run), True),
        (_about_drift(run), True),
        (_about_zeros(run), run.zeros >= much),
        (
            f"Stalled: {stall}. Raise max_norm, or lower eps below {stall.size:.0g}."
            if stall.matters
            else "",
            False,
        ),
        (_about_spikes(run), False),
    ]
    return [(text, is_urgent) for text, is_urgent in found if text]


def _about_nonfinite(run: Run) -> str:
    """How many norms are not finite."""
    if not run.nonfinite:
        return ""
    text = f"Not finite: the norm of {counted(run.nonfinite, 'step')} of {len(run.norms):,}"
    if run.departure is not None and run.finite[: run.departure.index].all():
        return f"{text}, after the norms had left their usual range."
    return f"{text}. No threshold helps there; Clipper(..., nonfinite='skip') skips these steps."


def _about_departure(run: Run) -> str:
    """Where the norms left their usual range for good."""
    found = run.departure
    if found is None:
        return ""
    after = (
        "most are not finite since then"
        if math.isinf(found.after)
        else f"is {found.after:.3g} since then, {found.after / found.before:.3g} times as large"
    )
    return (
        f"At step {run.numbers[found.index]:,} the norms left their usual range for good: their median was "
        f"{found.before:.3g} before, and {after}.{_loss_words(found)}"
    )


def _loss_words(found: Departure) -> str:
    if found.loss_before is None or found.loss_after is None:
        return ""
    if found.loss_rose:
        return f" The loss rose from {found.loss_before:.3g} to {found.loss_after:.3g}."
    losses = f"{found.loss_before:.3g}, then {found.loss_after:.3g}"
    return f" The loss did not rise ({losses}), so the change may be meant."


def _about_zeros(run: Run) -> str:
    """How many norms are 0."""
    if not run.zeros:
        return ""
    return f"The norm of {counted(run.zeros, 'step')} of {len(run.norms):,} is 0; these do not count."


def _about_drift(run: Run) -> str:
    """How the norms drift."""
    if not run.drifts:
        return ""
    text = f"The norms drift: {', '.join(f'{median:.3g}' for median in run.quarters)} are the medians of "
    text += "four equal parts of the run after its start."
    if run.quarters[-1] < run.quarters[0] / CONVERGES:
        text += " The run converges; a threshold that follows the norms, such as Percentile, would stop it."
    return text


def _about_spikes(run: Run) -> str:
    """Which steps are spikes, and whether they did harm."""
    if not run.is_spike.any():
        return ""
    ratios = run.found / usual_level(run.found)
    at = np.flatnonzero(run.is_spike)
    largest = at[np.argmax(ratios[at])]
    text = (
        f"The spikes: {counted(len(at), 'step')}, up to {ratios[largest]:.3g} times the norm around them "
        f"(step {run.numbers[run.counted[largest]]:,})."
    )
    if run.counted[at[-1]] == len(run.norms) - 1:
        text += " The last step is one of them: perhaps the run has just exploded."
    bad = harmful(run.counted[at], run.losses)
    if bad:
        text += f" The loss rose after {bad:,} of them."
    elif bad == 0:
        text += f" They did no harm: the loss did not rise after {'it' if len(at) == 1 else 'any of them'}."
    return text
