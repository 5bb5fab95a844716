"""Which of several thresholds to use, and whether that is more than chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from torchclip.cli.run.trial import CLASSES
from torchclip.cli.run.tries import AS_IT_IS, INTERRUPTED, Command, Tries, Try

Comparison = Literal["better", "worse", "no difference", "unknown"]

# Student's t for a probability of 2 % on both sides together, by the degrees of freedom; about 2.6 for more.
_STUDENT = {1: 31.8, 2: 6.96, 3: 4.54, 4: 3.75, 5: 3.36, 6: 3.14, 7: 3.0, 8: 2.9, 9: 2.82}
_STUDENT_OF_MANY = 2.8
# With one run each: how many times as large as the variation within their tails.
_TIMES_SPREAD = 3.0
_JUDGED = {
    "clips_every_step": "Clips most steps, so the learning rate alone sets how far most steps go: {}.",
    "never_clips": "Never clips: {}.",
    "too_high": "Did not keep the norms in their range: {}.",
}


def compared(tried: Try, reference: Try, maximize: bool = False) -> Comparison:
    """Whether the runs with a threshold are better than others by more than chance."""
    pairs = list(zip(tried.runs, reference.runs, strict=False))
    if any(run.problem == INTERRUPTED for pair in pairs for run in pair):
        return "unknown"
    failed = sum(math.isnan(run.score) for run, _ in pairs), sum(math.isnan(run.score) for _, run in pairs)
    if any(failed):
        if len(pairs) in failed and failed[0] != failed[1] and 0 in failed:
            return "worse" if failed[0] else "better"
        return "unknown"
    sign = -1.0 if maximize else 1.0
    differences = np.array([sign * (run.score - other.score) for run, other in pairs])
    if len(pairs) == 1:
        (run, other), *_ = pairs
        if run.score == other.score:
            return "no difference"
        least = _TIMES_SPREAD * math.hypot(run.spread, other.spread)
        if max(run.tail) < min(other.tail) or max(other.tail) < min(run.tail):
            # Then a run that varies widely, as one that has exploded, is as clear.
            least = _TIMES_SPREAD * min(run.spread, other.spread)
    else:
        student = _STUDENT.get(len(pairs) - 1, _STUDENT_OF_MANY)
        least = student * float(np.std(differences, ddof=1)) / math.sqrt(len(pairs))
    if math.isnan(least):
        return "unknown"
    difference = float(differences.mean())
    if abs(difference) <= least:
        return "no difference"
    return "better" if difference < 0 else "worse"


def verdict(tries: Tries, command: Command) -> str:
    """Which threshold to use, or that nothing is better than the script as it is."""
    agreed = (
        "Runs with other seeds agree to the bit, so they show nothing about chance: the script draws its "
        "numbers in another way, or none. "
        if tries.has_agreed
        else ""
    )
    ended = [
        each for each in tries.done if all(run.problem != INTERRUPTED for run in each.runs) and each.runs
    ]
    return agreed + _verdict(ended, command)


def _verdict(tries: Sequence[Try], command: Command) -> str:
    what, maximize = command.what, command.maximize
    several = _several_losses(tries)
    if several and command.metric is None:
        return (
            f"No verdict: {' and '.join(several)} have a loss each, and which of them matters is not known. "
            "Give --metric."
        )
    good = [each for each in tries if math.isfinite(each.score)]
    if not good:
        return f"No verdict: no threshold has a {what} at the end of its runs."
    reference = tries[0]
    if reference.threshold != AS_IT_IS or len(tries) < 2:
        return "No verdict: there is nothing to compare."
    found = {each.threshold: compared(each, reference, maximize) for each in tries[1:]}
    better = [each for each in good if found.get(each.threshold) == "better"]
    best = (max if maximize else min)(better or good, key=lambda each: each.score)
    if better:
        return _use(best, reference, tries, command)
    if "unknown" in found.values() and best is not reference:
        return (
            f"Cannot tell: {_named(best)} has the {_extreme(maximize)} {what} at the end, {best.score:.4g}, "
            "but these runs do not show how much it varies by chance. "
            f"Use --seeds {max(3, command.seeds + 2)}."
        )
    if best is reference or f"{best.score:.4g}" == f"{reference.score:.4g}":
        worse = [_named(each) for each in tries if found.get(each.threshold) == "worse"]
        return (
            f"Leave the script as it is: nothing has a better {what} at the end than its "
            f"{reference.score:.4g}. "
            + (f"Worse: {', '.join(worse)}." if worse else "No difference was found.")
        )
    return (
        f"Leave the script as it is: no difference was found. {_capital(_named(best))} has the "
        f"{_extreme(maximize)} {what} at the end, {best.score:.4g} in place of {reference.score:.4g}, but "
        "chance alone makes runs differ as much."
    )


def _use(best: Try, reference: Try, tries: Sequence[Try], command: Command) -> str:
    """The sentence for a threshold that is better than the script as it is."""
    as_it_is = f"{reference.score:.4g}" if math.isfinite(reference.score) else reference.runs[0].problem
    text = (
        f"Use {_named(best)}: the {command.what} at the end is {best.score:.4g}; with the script as it is: "
        f"{as_it_is}. That is more than chance"
    )
    text += "." if len(best.runs) > 1 else ", as far as one run each shows; --seeds 3 makes sure."
    close = [
        _named(each)
        for each in tries[1:]
        if each is not best and compared(each, best, command.maximize) == "no difference"
    ]
    return text + (f" No difference from it was found for {', '.join(close)}." if close else "")


def _several_losses(tries: Sequence[Try]) -> list[str]:
    """The optimizers with losses, if there are several."""
    found = next((run.losses for each in tries for run in each.runs if run.losses), {})
    return list(found) if len(found) > 1 else []


def judged(tries: Sequence[Try]) -> list[str]:
    """What is wrong with the thresholds themselves, as the first runs with each show it."""
    found: dict[str, list[str]] = {}
    for each in tries:
        histories = each.runs[0].histories if each.runs else {}
        for label, history in histories.items():
            advice = history.suggest()
            name = each.threshold if len(histories) == 1 else f"{each.threshold}, {label}"
            if advice.verdict == "in_the_way":
                found[f"{name}: {advice.reason}"] = []
            elif advice.verdict in _JUDGED:
                found.setdefault(_JUDGED[advice.verdict], []).append(name)
    return [text.format("; ".join(names)) for text, names in found.items()]


def _named(tried: Try) -> str:
    name = tried.threshold
    if name in ("none", AS_IT_IS):
        return "no clipping" if name == "none" else "the script as it is"
    return f"--threshold {name}" if name in CLASSES else f"max_norm={name}"


def _extreme(maximize: bool) -> str:
    return "highest" if maximize else "lowest"


def _capital(text: str) -> str:
    return text if text.startswith(("max_norm", "--")) else text[:1].upper() + text[1:]
