"""What a program may do wrong when it clips: rules over what was recorded of each step.

A rule takes the facts of one step and yields what it finds.  At the end a sentence says where that happened,
in how many steps, and what to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torchclip._core import arguments
from torchclip.cli.run.calls import Call, Site
from torchclip.cli.run.optimizer import OptimizerRecord

_BY_NORM = ("clip_grad_norm_", "clip_grads_with_norm_", "clip_grad_norm_per_parameter_")
_LEAST_SHARE = 0.05  # of an optimizer's steps: a mistake in fewer is an accident
_MOST_NAMES = 3


@dataclass
class StepFacts:
    """One step of an optimizer, and the calls of clipping functions before it.

    Attributes:
        record: the optimizer's record.
        backwards: the number of backward passes before this step, and before the previous one.
        updates: the number of updates of GradScalers before this step.
        calls: the calls on its parameters since its previous step, oldest first.
        others: the calls since then on tensors that no optimizer has, if they still exist.
        gradients: the ``id`` of each gradient with which it steps, by that of the parameter.
        has_clipper: whether the program gave it a Clipper.
        was_scaled: whether a call got its gradients before a GradScaler unscaled them.
    """

    record: OptimizerRecord
    backwards: tuple[int, int]
    updates: int
    calls: Sequence[Call]
    others: Sequence[Call]
    gradients: Mapping[int, int]
    has_clipper: bool
    was_scaled: Callable[[Call], bool]
    used: list[Call] = field(init=False)
    """The calls whose result it steps with."""
    stale: list[Call] = field(init=False)
    """The calls that no optimizer stepped with: a backward pass changed the gradients, or there were none."""

    def __post_init__(self) -> None:
        names, now = self.record.names.keys(), self.backwards[0]
        clips = [call for call in self.calls if call.clips]
        last = {call.parameters: call for call in clips}
        # After gradients that are not finite, a GradScaler skips a step, and others are clipped.
        self.used = [
            call
            for call in clips
            if call.is_of(names, now) and not (call.is_skipped and call is not last[call.parameters])
        ]
        for call in self.used:
            call.is_used = True
        self.stale = [call for call in clips if not call.is_used and not call.is_skipped]

    def missed(self, calls: Sequence[Call]) -> list[str]:
        """The names of the parameters whose gradients none of these calls got, nor a Clipper."""
        got = frozenset[int]().union(*(call.parameters for call in calls))
        names = self.record.names
        return [] if self.has_clipper else [names[key] for key in self.gradients if key not in got]


class Found(NamedTuple):
    """What a rule found in one step."""

    kind: str
    sites: tuple[Site, ...]
    what: str = ""
    names: Sequence[str] = ()


# Mistakes


def too_late(step: StepFacts) -> Iterator[Found]:
    """Clipped after the step, or before the backward pass: no step used it."""
    if step.used or step.has_clipper or not step.gradients or not step.stale:
        return
    call = step.stale[-1]
    is_after = call.has_gradients and call.backwards == step.backwards[1]
    yield Found("after the step" if is_after else "before backward", (call.site,), call.function)


def no_parameters(step: StepFacts) -> Iterator[Found]:
    """Gradients, copies, or nothing at all in place of parameters."""
    idle = [call for call in step.others if not call.has_gradients]
    # Those of the previous step, too, as the call may come after it.
    gradients = step.record.gradients.union(step.gradients.values())
    misses = bool(idle and step.missed(step.calls))
    for call in idle:
        if not gradients.isdisjoint(call.parameters):
            yield Found("gradients", (call.site,), call.function)
        elif misses and call.backwards == step.backwards[0]:
            without = "used up" if call.is_used_up else "empty"
            yield Found("copies" if call.parameters else without, (call.site,), call.function)


def still_scaled(step: StepFacts) -> Iterator[Found]:
    """Clipped while a GradScaler's scale was in the gradients."""
    for call in step.used:
        if step.was_scaled(call):
            yield Found("scaled", (call.site,), call.function)


# What may be intended


def a_part(step: StepFacts) -> Iterator[Found]:
    """The optimizer steps with gradients that the calls did not get."""
    missed = step.missed(step.used) if step.used else []
    if missed:
        sites = tuple(dict.fromkeys(call.site for call in step.used))
        yield Found("part", sites[:1], step.used[0].function, missed)


def each_micro_batch(step: StepFacts) -> Iterator[Found]:
    """The same call for each backward pass of a step."""
    used = {call.site: call.function for call in step.used}
    early = [
        call.site
        for call in step.stale
        # After an update they were those of a step that a GradScaler skipped.
        if call.has_gradients and call.backwards > step.backwards[1] and call.updates == step.updates
    ]
    for site in dict.fromkeys(early):
        if site in used:
            yield Found("micro-batch", (site,), used[site])


def twice(step: StepFacts) -> Iterator[Found]:
    """Several calls on the same gradients: with several thresholds, by several rules, or by two libraries."""
    if step.has_clipper and step.used:
        yield Found("clipper", (step.used[-1].site,), step.used[-1].function)
    got: frozenset[int] = frozenset()
    for i, call in enumerate(step.used):
        if not got.isdisjoint(call.parameters):
            before = next(each for each in step.used[:i] if not each.parameters.isdisjoint(call.parameters))
            kind = _kind_of_two(before, call)
            if kind:
                yield Found(kind, (before.site, call.site), f"{before.function} and then {call.function}")
        got |= call.parameters


def _kind_of_two(first: Call, second: Call) -> str:
    if (first.function in _BY_NORM) != (second.function in _BY_NORM):
        return "two rules"
    if first.site.package != second.site.package:
        return "two libraries"
    return "two thresholds" if first.effect.max_norm != second.effect.max_norm else ""


RULES = (too_late, no_parameters, still_scaled, a_part, each_micro_batch, twice)

_BETWEEN = "Call it after backward() and before step()."
_PARAMETERS = "Pass the parameters, such as model.parameters()."
# For each kind: whether it is a mistake, what happened, and what to do.
_KINDS = {
    "after the step": (True, "{what} came after the step {steps}, so no step used what it clipped", _BETWEEN),
    "before backward": (
        True,
        "{what} came before the backward pass {steps}, so no step used what it clipped",
        _BETWEEN,
    ),
    "gradients": (
        True,
        "{what} got gradients in place of parameters {steps}, and clipped nothing",
        _PARAMETERS,
    ),
    "copies": (
        True,
        "{what} got tensors without a gradient, perhaps copies, {steps}, and clipped nothing",
        "Pass the parameters that the optimizer has.",
    ),
    "used up": (
        True,
        "{what} got an iterator that was used up {steps}, and clipped nothing",
        "Pass a list, or call model.parameters() each time.",
    ),
    "empty": (True, "{what} got an empty list {steps}, and clipped nothing", _PARAMETERS),
    "scaled": (
        True,
        "{what} clipped gradients that were still multiplied by the GradScaler's scale {steps}",
        "Call scaler.unscale_(optimizer) before it.",
    ),
    "part": (
        False,
        "{what} did not get all gradients {steps}: the optimizer also stepped with {names}",
        "If that is not meant, pass all parameters of the optimizer.",
    ),
    "micro-batch": (
        False,
        "{what} clipped after each backward pass {steps}, and so clipped parts of a gradient, not their sum",
        "If that is not meant, call it once before step().",
    ),
    "two thresholds": (
        False,
        "these calls clipped the same gradients to different thresholds {steps}",
        "If that is not meant, remove one of them.",
    ),
    "two rules": (
        False,
        "{what} clipped the same gradients {steps}",
        "If that is not meant, remove one of them.",
    ),
    "two libraries": (
        False,
        "both lines clipped the same gradients {steps}, one of them in a library",
        "If that is not meant, remove your call, or the library's option.",
    ),
    "clipper": (
        False,
        "{what} and a torchclip.Clipper clipped the same gradients {steps}",
        "If that is not meant, remove the call.",
    ),
}


class Remark(NamedTuple):
    """A sentence for the report.

    Attributes:
        kind: what it is about.
        is_mistake: whether it cannot be intended.
        place: the lines that it is about.
        text: the sentence, with the remedy.
    """

    kind: str
    is_mistake: bool
    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass
class _Note:
    found: Found
    steps: Counter[int] = field(default_factory=Counter)
    names: dict[str, None] = field(default_factory=dict)


class Mistakes:
    """What the rules have found so far."""

    def __init__(self) -> None:
        self._notes: dict[tuple[str, tuple[Site, ...]], _Note] = {}
        self._records: dict[int, OptimizerRecord] = {}

    def judge(self, step: StepFacts) -> None:
        """Apply all rules to a step."""
        key = id(step.record)
        self._records[key] = step.record
        for found in {each[:2]: each for rule in RULES for each in rule(step)}.values():
            note = self._notes.setdefault(found[:2], _Note(found))
            note.steps[key] += 1
            note.names |= dict.fromkeys(found.names)

    def remarks(self) -> list[Remark]:
        """The sentences, mistakes first."""
        found = [remark for note in self._notes.values() if (remark := self._remark(note))]
        return sorted(found, key=lambda remark: not remark.is_mistake)

    def _remark(self, note: _Note) -> Remark | None:
        # Of several optimizers the one that it concerns most.
        ((key, count),) = note.steps.most_common(1)
        total = self._records[key].steps
        is_mistake, text, remedy = _KINDS[note.found.kind]
        if count < min(2, total) or (is_mistake and count < _LEAST_SHARE * total):
            return None
        names = arguments.some([*note.names], _MOST_NAMES)
        what = text.format(what=note.found.what, steps=f"in {count:,} of {total:,} steps", names=names)
        place = " and ".join(dict.fromkeys(map(str, note.found.sites)))
        return Remark(note.found.kind, is_mistake, place, f"{what}. {remedy}")
