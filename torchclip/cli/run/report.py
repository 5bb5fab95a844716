"""What ``torchclip run`` prints at the end: what clipping did, which threshold to take, and what it cost."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Iterator, Mapping

import numpy as np

from torchclip.cli.run.names import unique_names
from torchclip.cli.run.recorder import Cost, Recorder
from torchclip.cli.run.watch import Watch
from torchclip.cli.run.watched import Watched
from torchclip.history.history import History
from torchclip.history.layers import Layers

__all__ = ["histories", "report"]

_WIDTH = 80
_MOST_OPTIMIZERS, _MOST_LAYERS, _MOST_NONFINITE, _MOST_NAMES = 8, 3, 3, 4
STRAY = "no optimizer"


def report(recorder: Recorder, watch: Watch, seconds: float, end: str = "") -> str:
    """What clipping did and cost in a run of so many seconds, in a few lines.

    Args:
        recorder: the calls of torch's functions.
        watch: the steps of the optimizers.
        seconds: how long the run took.
        end: how it ended, unless as usual.
    """
    width = max(min(shutil.get_terminal_size().columns, _WIDTH), 20)
    found = labels(watch)
    lines = [f"torchclip: what clipping did in {_duration(seconds)}{end and ', '}{end}"]
    shown = dict(list(found.items())[:_MOST_OPTIMIZERS])
    for label, watched in shown.items():
        lines += ["", *_did(label, watched, watch)]
    if len(found) > len(shown):
        lines += ["", f"and {_count(len(found) - len(shown), 'optimizer')} more"]
    if len(recorder.calls.stray):
        lines += ["", *_strays(recorder.calls.stray)]
    if len(lines) == 1:
        lines += ["  No optimizer of torch's took a step, and no clipping function of torch's was called."]
    for label, watched in shown.items():
        if watched.steps:
            lines += ["", *_advice(label, watched.history, len(shown) > 1)]
    costs = _costs(recorder, watch, shown, seconds)
    if costs:
        lines += ["", "time", *costs]
    return "\n".join(part for line in lines for part in _wrapped(line, width))


def _wrapped(line: str, width: int) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(line, width, subsequent_indent=f"{indent}  ", break_on_hyphens=False) or [""]


def labels(watch: Watch) -> dict[str, Watched]:
    """The optimizers, each by a label of its own."""
    names = unique_names([w.candidates for w in watch.watched], [w.kind for w in watch.watched])
    return {w.label(name): w for name, w in zip(names, watch.watched, strict=True)}


def histories(recorder: Recorder, watch: Watch) -> dict[str, History]:
    """The steps of each optimizer, by its label, with the norms of its parameters."""
    found = {}
    for label, watched in labels(watch).items():
        found[label] = watched.history
        if not len(watched.history.layers):
            watched.history.layers = watched.layers
    if len(recorder.calls.stray):
        found[STRAY] = recorder.calls.stray
    return found


# What clipping did


def _did(label: str, watched: Watched, watch: Watch) -> Iterator[str]:
    summary = watched.history.summary()
    yield f"{label}: {_clipped_by(watched, watch)}"
    if watched.problem:
        yield f"  {watched.problem}"
    yield from _numbers(watched.history)
    for step, names in list(watched.nonfinite.items())[:_MOST_NONFINITE]:
        where = ", ".join(names[:_MOST_NAMES]) or "unknown"
        more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
        yield f"  not finite at step {step:,}: {where}{more}"
    if summary.nonfinite > _MOST_NONFINITE and len(watched.nonfinite) > _MOST_NONFINITE:
        yield f"  and at {_count(summary.nonfinite - _MOST_NONFINITE, 'step')} more"
    largest = _largest(watched.layers)
    if largest:
        yield f"  largest layers, by their share of the squared norm: {largest}"


def _clipped_by(watched: Watched, watch: Watch) -> str:
    if watch.trial.clips and not watched.problem:
        to = "" if watch.trial.threshold is None else _to(watched.history)
        if watch.trial.is_per_parameter:  # a record holds the smallest, which tells nothing
            to = ", each parameter to a threshold of its own"
        return f"{watch.trial}{to}{_in_place_of(watch)}"
    if watch.trial.none:
        return f"{watch.trial}{_in_place_of(watch)}"
    if not watched.clipped_by:
        return "clipped by nothing"
    return f"clipped by {' and '.join(watched.clipped_by)}{_to(watched.history)}"


def _in_place_of(watch: Watch) -> str:
    """Which clipping of the program's own does not count."""
    theirs = list(watch.calls_replaced) + ["Clipper"] * bool(watch.replaced_clippers)
    return f", in place of the script's own {' and '.join(theirs)}" if theirs else ""


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
        f"  {_count(summary.steps, 'step')}: {summary.clipped:,} clipped ({summary.clipped_share:.1%}), "
        f"{summary.nonfinite:,} not finite, {summary.skipped:,} skipped"
    )
    if summary.quantiles:
        quantiles = ", ".join(f"{q:.0%} {norm:.4g}" for q, norm in summary.quantiles.items())
        where = "" if summary.kept == summary.steps else f" (of the last {summary.kept:,} steps)"
        yield (
            f"  norm before clipping: {quantiles}{where}; largest {summary.largest_norm:.4g} "
            f"at step {summary.largest_step:,}"
        )


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


# The advice


def _advice(label: str, history: History, several: bool) -> Iterator[str]:
    advice = history.suggest()
    yield f"advice for {label}" if several else "advice"
    yield f"  {advice.reason}"
    yield from (f"  {note}" for note in advice.notes)
    if advice.table:
        after = f" after the first {advice.warmup:,}" if advice.warmup else ""
        yield f"  On the {advice.steps:,} steps{after}, a fixed threshold clips"
        yield from (f"    {share:>5.1%} of them with {norm:.3g}" for share, norm in advice.table.items())


# Time


def _costs(recorder: Recorder, watch: Watch, shown: Mapping[str, Watched], seconds: float) -> list[str]:
    lines = [_cost_line(name, cost, seconds) for name, cost in recorder.costs.items()]
    for label, watched in shown.items():
        if watched.seconds:
            lines.append(
                f"  Clipper of {label}: {_duration(float(np.median(watched.seconds)))} a step "
                f"(measured {_count(len(watched.seconds), 'time')})"
            )
    if watch.between:
        own = watch.seconds + recorder.seconds / watch.steps
        of_step = f"{own / watch.between:.1%} of the {_duration(watch.between)} from step to step"
        lines.append(f"  looking on: {_duration(own)} a step, {of_step}")
    return lines


def _cost_line(name: str, cost: Cost, seconds: float) -> str:
    line = f"  {name}: {_count(cost.calls, 'call')}"
    if cost.ours:
        ours = float(np.median(cost.ours))
        line += f" of {_duration(ours)}"
    if cost.torch_error:
        return f"{line}; torch's own fails here ({cost.torch_error})"
    if not (cost.ours and cost.torchs):
        return f"{line}; torch's own was not measured"
    torchs = float(np.median(cost.torchs))
    saved = (torchs - ours) * cost.calls
    return (
        f"{line}; torch's own {_duration(torchs)} (measured {_count(len(cost.torchs), 'time')}): "
        f"{'saves' if saved >= 0 else 'costs'} {_duration(abs(saved))}, {abs(saved) / seconds:.1%} of the run"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"
