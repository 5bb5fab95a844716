"""Which threshold to use: a verdict on the one that a run had, or the number that suits the run."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchclip.history import number, verdict
from torchclip.history.breaks import breaks_note
from torchclip.history.layers import Layers
from torchclip.history.notes import notes
from torchclip.history.records import Record
from torchclip.history.run import LEAST_STEPS, LEAST_USABLE, MUCH, Run, counted
from torchclip.history.stalls import ClippedSizes, Stall
from torchclip.history.updates import updates_note
from torchclip.history.verdict import Verdict


@dataclass(frozen=True)
class Advice:
    """Whether to keep the threshold of a run, and which one to use otherwise; ``str()`` says it in words.

    It uses the norms before clipping, of those kept steps whose norm is finite; of a step with several
    records, such as those of LBFGS, the first.  With another threshold, the run may have had other norms.
    """

    max_norm: float | None
    """The threshold to use: that of the run if the verdict is to keep it; None if there are too few steps."""
    verdict: Verdict | None
    """The verdict on the threshold of the run; None if it had none.

    ``"keep"``: it clips few steps, or is between half and twice the number that suits the norms.
    ``"clips_every_step"``, or most of them: the learning rate alone sets how far a step goes, which may be
    meant.  ``"never_clips"``: it is far above all norms.  ``"in_the_way"``: it makes gradients so small that
    the optimizer's steps are lost.  ``"too_high"``: the norms left their range in spite of it.
    ``"unknown"``: the run does not show it.
    """
    reason: str
    """The verdict in words, or the reason for this ``max_norm``, or for none."""
    words: tuple[str, ...]
    """The reason and other observations, the most important first: steps that were not finite, explosion,
    drift, spikes."""
    table: dict[float, float] = field(default_factory=dict)
    """Share of clipped steps → the ``max_norm`` that clips them, at least one step; empty if there are too
    few steps."""
    spikes: int = 0
    """The number of steps whose norm was far above those of the steps around them."""
    drifts: bool = False
    """Whether the norms of one part of the run, after its start, are larger than those of another by more
    than chance, and at least twice as large; with fewer than a hundred steps, three times."""
    steps: int = 0
    """The number of steps on which the advice is based."""
    warmup: int = 0
    """The number of kept steps that do not count: the first tenth of a run, which is not typical."""
    nonfinite: int = 0
    """The number of kept steps whose norm is not finite; they do not count either."""
    explodes: int | None = None
    """The number of the step at which the norms left their usual range and did not return, or None."""
    stalls: float = 0.0
    """The share of steps whose clipped gradients are below the optimizer's ``eps``: they change little."""

    @property
    def lines(self) -> list[str]:
        """Everything, one line per item."""
        lines = [*self.words]
        if self.table:
            after = f" after the first {self.warmup:,}" if self.warmup else ""
            lines.append(f"On the {self.steps:,} steps{after}, a fixed threshold clips")
        lines += [
            f"  {share:>5.1%} of the steps with max_norm={norm:.3g}" for share, norm in self.table.items()
        ]
        return lines

    def __str__(self) -> str:
        return "\n".join(
            textwrap.fill(line, 80, subsequent_indent="    " if line.startswith(" ") else "")
            for line in self.lines
        )


def advise(
    records: Sequence[Record],
    earlier: int,
    clipped_sizes: ClippedSizes,
    max_norm: float | None,
    layers: Layers,
) -> Advice:
    """The advice for a run, of which the last records are kept, oldest first.

    ``earlier`` is the number of steps before them, and ``max_norm`` the threshold to judge, None for that of
    the records.
    """
    firsts = [record for i, record in enumerate(records) if i == 0 or record.step != records[i - 1].step]
    run = Run(firsts, earlier)
    stall = clipped_sizes.stall(firsts) if max_norm is None else Stall()
    threshold = verdict.used(run, max_norm)
    facts: dict[str, Any] = {
        "steps": len(run.counted),
        "warmup": run.warmup,
        "nonfinite": run.nonfinite,
        "explodes": None if run.departure is None else int(run.numbers[run.departure.index]),
        "stalls": stall.share,
    }
    judged: Verdict | None = None
    max_norm = None
    reason = _refusal(run)
    if not reason:
        max_norm, reason = number.best(run)
        facts |= {"table": number.table(run, max_norm), "spikes": int(run.is_spike.sum())}
        facts["drifts"] = run.drifts
        if threshold is not None:
            judged, max_norm, reason = verdict.judge(run, threshold, max_norm, reason, stall)
    elif threshold is not None:
        judged, reason = "unknown", f"Whether {threshold.name} is right cannot be told. {reason}"
    found = notes(run, Stall() if judged == "in_the_way" else stall)
    found += [(note, False) for note in _notes_on_layers(run, layers)]
    first = [note for note, is_urgent in found if is_urgent and threshold is None]
    rest = [note for note, is_urgent in found if not is_urgent or threshold is not None]
    return Advice(max_norm, judged, reason, (*first, reason, *rest), **facts)


def _notes_on_layers(run: Run, layers: Layers) -> Iterator[str]:
    """What single parameters show."""
    yield from breaks_note(*layers.read(), layers._in_model_order)
    if len(run.numbers):
        yield from updates_note(layers.updates, int(run.numbers[min(run.warmup, len(run.numbers) - 1)]))


def _refusal(run: Run) -> str:
    """Why there is no advice, and how many steps it takes; empty if there is."""
    if not len(run.norms):
        return "No advice: no step has been recorded yet."
    if not run.finite.any():
        return "No advice: no step had a finite norm. Lower the learning rate to a tenth, and ask again."
    if run.has_left:
        return ""
    usable = int(run.usable.sum())
    if len(run.norms) >= LEAST_STEPS and usable <= MUCH * len(run.norms):
        return "No advice: nearly all norms are 0."
    if usable < LEAST_STEPS:
        what = "a norm above 0" if run.zeros else "a finite norm"
        return f"Too early for advice: {counted(usable, 'step')} had {what}, and advice needs {LEAST_STEPS}."
    if len(run.counted) < LEAST_USABLE:
        steps = counted(len(run.counted), "step")
        return (
            f"No advice: only {steps} after the first tenth had a norm above 0; advice needs {LEAST_USABLE}."
        )
    return ""
