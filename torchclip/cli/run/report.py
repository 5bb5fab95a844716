"""The report of ``torchclip run``: what clipping did, which threshold to use, and what recording cost."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from datetime import datetime
from statistics import median

import numpy as np

from torchclip.cli.run.functions import FunctionRecorder
from torchclip.cli.run.names import unique_names
from torchclip.cli.run.optimizer import OptimizerRecord
from torchclip.cli.run.steps import StepRecorder
from torchclip.cli.run.together import joint_history, together
from torchclip.history.history import History
from torchclip.history.layers import Layers
from torchclip.history.signs import final_loss

__all__ = ["REPORT", "about", "histories", "labels", "report"]

_WIDTH = 80
_MOST_OPTIMIZERS, _MOST_LAYERS, _MOST_NONFINITE, _MOST_NAMES = 8, 3, 3, 4
STRAY = "no optimizer"
REPORT = "torchclip: what clipping did"
"""The beginning of a report."""


def report(functions: FunctionRecorder, steps: StepRecorder, seconds: float, end: str = "") -> str:
    """What clipping did and cost in a run, in a few lines.

    Args:
        functions: the calls of torch's functions.
        steps: the steps of the optimizers.
        seconds: how long the run took.
        end: how it ended, if not normally.
    """
    width = max(min(shutil.get_terminal_size().columns, _WIDTH), 20)
    found = labels(steps)
    lines = [f"{REPORT} in {_duration(seconds)}{end and ', '}{end}"]
    shown = dict(list(found.items())[:_MOST_OPTIMIZERS])
    for label, optimizer in shown.items():
        lines += ["", *_did(label, optimizer, functions, steps)]
    if len(found) > len(shown):
        lines += ["", f"and {_count(len(found) - len(shown), 'optimizer')} more"]
    joint = joint_histories(found)
    for label, history in joint.items():
        lines += ["", f"{label}, which step together", *(f"  {line}" for line in _numbers(history))]
    if len(functions.calls.stray):
        lines += ["", *_strays(functions.calls.stray)]
    if len(lines) == 1:
        lines += ["  No optimizer of torch's took a step, and no clipping function of torch's was called."]
    advised = joint | {label: optimizer.history for label, optimizer in shown.items() if optimizer.steps}
    for label, history in advised.items():
        lines += ["", f"advice for {label}" if len(advised) > 1 else "advice"]
        lines += [f"  {line}" for line in history.suggest().lines]
    costs = list(_costs(functions, steps, seconds))
    if costs:
        lines += ["", "time", *costs]
    return "\n".join(part for line in lines for part in _wrapped(line, width))


def _wrapped(line: str, width: int) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(line, width, subsequent_indent=f"{indent}  ", break_on_hyphens=False) or [""]


def labels(steps: StepRecorder) -> dict[str, OptimizerRecord]:
    """The optimizers, each with its own label; those that share a Clipper count as one."""
    names = unique_names(
        [each.candidates for each in steps.optimizers], [each.kind for each in steps.optimizers]
    )
    together: dict[int, tuple[list[str], OptimizerRecord]] = {}
    for name, optimizer in zip(names, steps.optimizers, strict=True):
        label = optimizer.label(name)
        together.setdefault(id(optimizer.history), ([], optimizer))[0].append(label)
    return {" and ".join(found): optimizer for found, optimizer in together.values()}


def joint_histories(optimizers: Mapping[str, OptimizerRecord]) -> dict[str, History]:
    """The joint steps of the optimizers that step together, by their labels."""
    names = {id(optimizer): label for label, optimizer in optimizers.items()}
    groups = together(list(optimizers.values()))
    return {" and ".join(names[id(each)] for each in group): joint_history(group) for group in groups}


def histories(functions: FunctionRecorder, steps: StepRecorder) -> dict[str, History]:
    """The steps of each optimizer, and of optimizers that step together, with their parameters' norms."""
    found = joint_histories(labels(steps))
    for label, optimizer in labels(steps).items():
        found[label] = optimizer.history
        if not len(optimizer.history.layers):
            optimizer.history.layers = optimizer.layers
    if len(functions.calls.stray):
        found[STRAY] = functions.calls.stray
    return found


def about(
    functions: FunctionRecorder, steps: StepRecorder, seconds: float, command: str, end: str = ""
) -> dict[str, list[str]]:
    """Further lines on the page, by an optimizer's label: how it was clipped, the largest layers.

    Under the empty label: the script, the date, the time it took, and the cost of clipping.
    """
    date = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    run = [f"{command}, {date}, {_duration(seconds)}{end and ', '}{end}"]
    found = {"": [*run, *(line.strip() for line in _costs(functions, steps, seconds))]}
    for label, optimizer in labels(steps).items():
        clipped_by = _clipped_by(optimizer, functions, steps)
        found[label] = [line[:1].upper() + line[1:] for line in (clipped_by, *_about(optimizer))]
    return found


# What clipping did


def _did(
    label: str, optimizer: OptimizerRecord, functions: FunctionRecorder, steps: StepRecorder
) -> Iterator[str]:
    yield f"{label}: {_clipped_by(optimizer, functions, steps)}"
    yield from (f"  {line}" for line in _numbers(optimizer.history))
    yield from (f"  {line}" for line in _about(optimizer))


def _about(optimizer: OptimizerRecord) -> Iterator[str]:
    """Problems, parameters with gradients that were not finite, and the largest layers."""
    if optimizer.problem:
        yield optimizer.problem
    nonfinite = optimizer.history.summary().nonfinite
    for step, names in list(optimizer.nonfinite.items())[:_MOST_NONFINITE]:
        where = ", ".join(names[:_MOST_NAMES]) or "unknown"
        more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
        yield f"not finite at step {step:,}: {where}{more}"
    if nonfinite > _MOST_NONFINITE and len(optimizer.nonfinite) > _MOST_NONFINITE:
        yield f"and at {_count(nonfinite - _MOST_NONFINITE, 'step')} more"
    largest = _largest(optimizer.layers)
    if largest:
        yield f"largest layers, by their share of the squared norm: {largest}"


def _clipped_by(optimizer: OptimizerRecord, functions: FunctionRecorder, steps: StepRecorder) -> str:
    if steps.trial.replaces and (steps.trial.none or not optimizer.problem):
        to = "" if steps.trial.threshold is None else _to(optimizer.history)
        if steps.trial.is_per_parameter:  # a record has only the smallest threshold, which is not informative
            to = ", each parameter to a threshold of its own"
        theirs = list(functions.replaced) + ["Clipper"] * bool(steps.replaced_clippers)
        in_place = f", in place of the script's own {' and '.join(theirs)}" if theirs else ""
        return f"{steps.trial}{to}{in_place}"
    policy = "" if steps.trial.nonfinite is None else f", {steps.trial}"
    if not optimizer.clipped_by:
        return f"clipped by nothing{policy}"
    return f"clipped by {' and '.join(optimizer.clipped_by)}{_to(optimizer.history)}{policy}"


def _to(history: History) -> str:
    """The threshold, or its range."""
    thresholds = [record.max_norm for record in history if math.isfinite(record.max_norm)]
    if not thresholds:
        return ""
    low, high = min(thresholds), max(thresholds)
    return f" to {low:.4g}" if low == high else f" to {low:.4g} … {high:.4g}"


def _numbers(history: History) -> Iterator[str]:
    summary = history.summary()
    yield (
        f"{_count(summary.steps, 'step')}: {summary.clipped:,} clipped ({summary.clipped_share:.1%}), "
        f"{summary.nonfinite:,} not finite, {summary.skipped:,} skipped"
    )
    if summary.quantiles:
        quantiles = ", ".join(f"{q:.0%} {norm:.4g}" for q, norm in summary.quantiles.items())
        where = "" if summary.kept == summary.steps else f" (of the last {summary.kept:,} steps)"
        yield (
            f"norm before clipping: {quantiles}{where}; largest {summary.largest_norm:.4g} "
            f"at step {summary.largest_step:,}"
        )
    losses = [record.loss for record in history if record.loss is not None]
    if losses:
        start = "first" if summary.kept == summary.steps else "first kept"
        yield f"loss: {losses[0]:.4g} at the {start} step, {final_loss(losses):.4g} over the last tenth"


def _strays(history: History) -> Iterator[str]:
    yield "clipped, but by no optimizer of torch's stepped with"
    summary = history.summary()
    yield f"  clipped {summary.clipped:,} of {_count(summary.steps, 'time')} ({summary.clipped_share:.1%})"
    finite = [record.total_norm for record in history if not record.nonfinite]
    if finite:
        low, middle, high = np.quantile(finite, (0, 0.5, 1))
        yield f"  norm before clipping: min {low:.4g}, median {middle:.4g}, max {high:.4g}"


def _largest(layers: Layers) -> str:
    names, steps, norms = layers.read()
    usable = norms[np.isfinite(norms).all(axis=1) & (norms > 0).any(axis=1)] if steps else norms
    if len(names) < 2 or not len(usable):
        return ""
    squares = (usable / usable.max(axis=1, keepdims=True)) ** 2
    shares = (squares / squares.sum(axis=1, keepdims=True)).mean(axis=0)
    order = np.argsort(-shares, kind="stable")[:_MOST_LAYERS]
    return ", ".join(f"{names[i]} {shares[i]:.0%}" for i in order)


# Time


def _costs(functions: FunctionRecorder, steps: StepRecorder, seconds: float) -> Iterator[str]:
    for name, count in functions.counts.items():
        each = median(functions.seconds[name])
        share = f"{each * count / seconds:.1%} of the run"
        yield f"  {name}: {_count(count, 'call')} of {_duration(each)}, {share}"
    if steps.between:
        share = f"{steps.seconds / steps.between:.1%} of the {_duration(steps.between)} from step to step"
        yield f"  recording: {_duration(steps.seconds)} a step, {share}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    """A time with three digits and its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"
