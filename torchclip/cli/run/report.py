"""What ``torchclip run`` prints at the end: what clipping did and cost, as medians.

``torchclip.cli.run.recorder.Recorder`` says how that is measured.
"""

from __future__ import annotations

import numpy as np

from torchclip.cli.run.recorder import Cost, Recorder

__all__ = ["report"]


def report(recorder: Recorder, seconds: float) -> str:
    """What clipping did and cost in a run of so many seconds, in a few lines."""
    lines = [_cost_line(name, cost, seconds) for name, cost in recorder.costs.items()]
    if not lines:
        lines.append(
            "torch's clipping functions were not called through torch.nn.utils; "
            "a torchclip.Clipper has its own history"
        )
    lines += _step_lines(recorder)
    return "\n".join(
        [f"torchclip: what clipping did in {_duration(seconds)}", *(f"  {line}" for line in lines)]
    )


def _cost_line(name: str, cost: Cost, seconds: float) -> str:
    line = f"{name}: {_count(cost.calls, 'call')}"
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


def _step_lines(recorder: Recorder) -> list[str]:
    summary = recorder.history.summary()
    if not summary.steps:
        return []
    lines = [
        f"clipped {summary.clipped:,} of {_count(summary.steps, 'time')} ({summary.clipped_share:.1%}); "
        f"non-finite norms: {summary.nonfinite:,}"
    ]
    finite = [record.total_norm for record in recorder.history if not record.nonfinite]
    if finite:
        latest = "" if summary.kept == summary.steps else f" of the last {summary.kept:,}"
        low, middle, high = np.quantile(finite, (0, 0.5, 1))
        lines.append(f"norm before clipping{latest}: min {low:.4g}, median {middle:.4g}, max {high:.4g}")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"
