"""The report of ``torchclip run``: what is worth a look, what clipping did, and which threshold to use."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from torchclip._core import arguments
from torchclip.cli.run.mistakes import Remark
from torchclip.cli.run.names import labels
from torchclip.cli.run.optimizer import OptimizerRecord
from torchclip.cli.run.steps import StepRecorder
from torchclip.cli.run.trial import Trial
from torchclip.history.history import History
from torchclip.history.layers import Layers
from torchclip.history.records import Record
from torchclip.history.run import counted
from torchclip.history.signs import final_loss

_WIDTH = 80
_MOST_OPTIMIZERS, _MOST_LAYERS, _MOST_NONFINITE, _MOST_NAMES = 8, 3, 3, 4
REPORT = "torchclip: report on a run of"
"""The beginning of a report."""


class Section(NamedTuple):
    """Optimizers that are reported as one, and their steps, with the norms of the parameters."""

    optimizer: OptimizerRecord
    """The only one, or the first of several."""
    history: History


def report(run: StepRecorder, took: str, remarks: Sequence[Remark] = ()) -> str:
    """What clipping did in a run, in a few lines.

    Args:
        run: what was recorded.
        took: how long the run took, and how it ended.
        remarks: what is worth a look.
    """
    found = sections(run)
    shown = dict(list(found.items())[:_MOST_OPTIMIZERS])
    lines = [f"{REPORT} {took}"]
    if remarks:
        lines += ["", "worth a look", *_indented(map(str, remarks))]
    for label, section in shown.items():
        clipped_by, *more = _about(section, run.trial)
        lines += ["", f"{label}: {clipped_by}", *_indented([*_numbers(section.history), *more])]
    if len(found) > len(shown):
        lines += ["", f"and {counted(len(found) - len(shown), 'optimizer')} more"]
    if len(lines) == 1:
        lines += ["  No torch.optim.Optimizer took a step."]
    for label, section in shown.items():
        lines += ["", _advice_on(label if len(shown) > 1 else "", section, run.trial)]
        lines += _indented(section.history.suggest().lines)
    return "\n".join(map(filled, lines))


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def filled(line: str) -> str:
    """A line in the width of the terminal; what does not fit is further indented below."""
    width = max(min(shutil.get_terminal_size().columns, _WIDTH), 20)
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.fill(line, width, subsequent_indent=f"{indent}  ", break_on_hyphens=False)


def sections(run: StepRecorder) -> dict[str, Section]:
    """The optimizers by their labels; those with one Clipper are one, also those in backward passes."""
    of_each = labels([(each.kind, each.variable, each.names.values()) for each in run.optimizers])
    found: dict[int, tuple[list[str], list[OptimizerRecord]]] = {}
    for label, optimizer in zip(of_each, run.optimizers, strict=True):
        key = 0 if optimizer.rounds else id(optimizer.history)
        names, records = found.setdefault(key, ([], []))
        names.append(label)
        records.append(optimizer)
    if len(found.get(0, ([], []))[0]) > 1:
        names, records = found[0]
        names[:] = [f"{len(names)} optimizers that step in backward passes"]
    joint = {" and ".join(names): Section(records[0], _joined(records)) for names, records in found.values()}
    for section in joint.values():
        if not len(section.history.layers):
            section.history.layers = section.optimizer.layers
    return joint


def _joined(optimizers: Sequence[OptimizerRecord]) -> History:
    """The steps of an optimizer, or of several as one for each backward pass."""
    if len(optimizers) == 1 or not optimizers[0].rounds:
        return optimizers[0].history
    rounds: dict[int, list[Record]] = {}
    for each in optimizers:
        for record in each.history:
            if record.step < len(each.rounds):
                rounds.setdefault(each.rounds[record.step], []).append(record)
    joint = History()
    for step, parts in enumerate(rounds[number] for number in sorted(rounds)):
        joint.append(
            step,
            math.hypot(*(part.total_norm for part in parts)),
            min(part.max_norm for part in parts),
            min(part.clip_coef for part in parts),
            all(part.skipped for part in parts),
            next((part.loss for part in parts if part.loss is not None), None),
        )
    return joint


def about(run: StepRecorder, title: str) -> dict[str, list[str]]:
    """Further lines on the page, by an optimizer's label: how it was clipped, the largest layers.

    Under the empty label: the title, with the date.
    """
    found = {"": [title]}
    for label, section in sections(run).items():
        found[label] = [line[:1].upper() + line[1:] for line in _about(section, run.trial)]
    return found


# What clipping did


def _about(section: Section, trial: Trial) -> Iterator[str]:
    """What has clipped, problems, parameters with non-finite gradients, and the largest layers."""
    optimizer = section.optimizer
    yield _clipped_by(section, trial)
    if optimizer.problem:
        yield optimizer.problem
    for step, names in list(optimizer.nonfinite.items())[:_MOST_NONFINITE]:
        yield f"not finite at step {step:,}: {arguments.some(names, _MOST_NAMES) or 'unknown'}"
    more_steps = section.history.summary().nonfinite - _MOST_NONFINITE
    if len(optimizer.nonfinite) > _MOST_NONFINITE and more_steps > 0:  # a new Clipper's history begins anew
        yield f"and at {counted(more_steps, 'step')} more"
    largest = _largest(optimizer.layers)
    if largest:
        yield f"largest layers, by their share of the squared norm: {largest}"


def _advice_on(label: str, section: Section, trial: Trial) -> str:
    """The heading of the advice, with what is judged."""
    ways = [str(trial)] if trial.replaces else section.optimizer.clipped_by
    on = f" on {' or '.join(ways)}" if ways else ""
    return f"advice{on}{label and ' for '}{label}"


def _clipped_by(section: Section, trial: Trial) -> str:
    optimizer = section.optimizer
    if trial.replaces and (trial.none or not optimizer.problem):
        to = "" if trial.threshold is None else _to(section.history)
        if trial.threshold == "adagc":  # a record has only the smallest threshold, which is not informative
            to = ", each parameter to a threshold of its own"
        theirs = " and ".join(trial.replaced)
        in_place = f", in place of the script's own {theirs}" if theirs else ""
        what = f"nothing was clipped ({trial})" if trial.none else f"clipped by {trial}"
        return f"{what}{to}{in_place}"
    if not optimizer.clipped_by:
        return "not clipped"
    return f"clipped{_to(section.history)} by {' or '.join(optimizer.clipped_by)}"


def _to(history: History) -> str:
    """The threshold, or its range."""
    thresholds = [record.max_norm for record in history if math.isfinite(record.max_norm)]
    if not thresholds:
        return ""
    low, high = min(thresholds), max(thresholds)
    return f" to {low:.4g}" if low == high else f" to {low:.4g} … {high:.4g}"


def _numbers(history: History) -> Iterator[str]:
    yield from str(history.summary()).splitlines()
    losses = losses_of(history)
    if losses:
        yield f"loss: {losses[0]:.4g} at first, {final_loss(losses):.4g} over the last tenth"


def losses_of(history: History) -> list[float]:
    """The loss of each kept step that has one."""
    return [record.loss for record in history if record.loss is not None]


def _largest(layers: Layers) -> str:
    names, steps, norms = layers.read()
    usable = norms[np.isfinite(norms).all(axis=1) & (norms > 0).any(axis=1)] if steps else norms
    if len(names) < 2 or not len(usable):
        return ""
    squares = (usable / usable.max(axis=1, keepdims=True)) ** 2
    shares = (squares / squares.sum(axis=1, keepdims=True)).mean(axis=0)
    order = np.argsort(-shares, kind="stable")[:_MOST_LAYERS]
    return ", ".join(f"{names[i]} {shares[i]:.0%}" for i in order)
