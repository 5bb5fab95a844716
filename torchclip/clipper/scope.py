"""Which gradients are clipped together: sets of optimizers' gradients, each with a norm and a threshold."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias, cast

from torch import Tensor
from torch.optim import Optimizer

from torchclip._core import arguments, gather, joint_norms, scalars
from torchclip._core.batch import Batch, Facts, Norm, Norms
from torchclip._core.ranks.exchange import Kind
from torchclip.clipper.optimizers import Group, grad_scale_of, groups_of, unscaled
from torchclip.clipper.settings import Settings

OwnMaxNorms: TypeAlias = Mapping[int, float | None]


@dataclass(eq=False)
class ClipSet:
    """Gradients that are clipped together by one norm, or each by its own.

    Attributes:
        parameters: their parameters.
        own: the threshold of their own parameter group, or None.
        each: whether each of them has a norm and a threshold.
        batch: the gradients.
        norms: their norms, or the one norm, without a GradScaler's scale.
        max_norms: a threshold for each norm, or one for all of them.
        clip_coefs: the clip coefficient for each norm.
        is_zeroed: whether its non-finite elements become 0.
    """

    parameters: list[Tensor]
    own: float | None
    each: bool
    # The name of the norm, or that of each parameter; the list must not be changed.
    _names: list[str]
    batch: Batch = field(init=False)
    norms: Norms = field(default_factory=list)
    max_norms: float | Norms = field(default_factory=list)
    clip_coefs: Norms = field(default_factory=list)
    is_zeroed: bool = False

    def names(self) -> list[str]:
        """The names of the norms; they must be read before any user code runs, and are cached."""
        if self.each and len(self.batch.all) != len(self._names):
            # Some parameters have no gradient, or share one, which is clipped once.
            named = zip(self.parameters, self._names, strict=True)
            of_grad = {id(p.grad): name for p, name in named if p.grad is not None}
            self._names = [of_grad[id(grad)] for grad in self.batch.all]
        return self._names

    def limit(self, max_norms: float | Norms, eps: float) -> None:
        """Set the threshold of each norm, and with it the clip coefficient."""
        self.max_norms = max_norms
        self.clip_coefs = scalars.clip_coefs(max_norms, self.norms, eps)

    def is_absent(self) -> bool:
        """Whether there is certainly nothing to measure, on any rank."""
        return isinstance(self.norms, list) and all(norm < 0 for norm in self.norms)

    def scale_(self) -> None:
        """Multiply the gradients in place."""
        if self.each:
            self.batch.scale_each_(self.clip_coefs)
        else:
            self.batch.scale_(self.clip_coefs[0])


class Snapshot:
    """The gradients of some optimizers at one moment, in sets, with their norms and what is decided.

    Args:
        optimizers: the optimizers.
        settings: what is clipped together.
        only: the optimizer whose gradients these are; None for those of all.
        own: the thresholds of some parameter groups, by the id of the group, which are not read again.

    Attributes:
        sets: the sets that are clipped together.
        grad_scale: the GradScaler's scale by which they are multiplied.
        total_norm: the norm of all gradients, ``scalars.ABSENT`` if there are none.
        repeats: whether two optimizers hold the same parameter.
        facts: ``Facts`` about the gradients, those of all ranks if they are sharded.
        skipped: whether the step is skipped; a truth value on the device if the host does not know it.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        settings: Settings,
        only: int | None = None,
        own: OwnMaxNorms = MappingProxyType({}),
    ) -> None:
        self._optimizers, self._settings, self._only = optimizers, settings, only
        self._held = groups_of(optimizers, only)
        self.grad_scale = grad_scale_of(optimizers)
        kind = Kind.CLIP_EACH if settings.each else Kind.CLIP
        try:
            self._own = own_max_norms(self._held, own)
        except (TypeError, ValueError):
            gather.tell_ranks([group.parameters for group in self._held], settings.groups, kind)
            raise
        self.sets = self._sets()
        batches = gather.several([each.parameters for each in self.sets], settings.groups, kind)
        for clip_set, batch in zip(self.sets, batches, strict=True):
            clip_set.batch = batch
        # Whether a gradient is in several sets, such as one that parameters of two groups share.
        self._overlap = len(self.sets) > 1 and len({*map(id, self.grads)}) < len(self.grads)
        held = [id(p) for group in self._held for p in group.parameters] if settings.several else []
        self.repeats = len(set(held)) < len(held)
        self.total_norm: Norm = scalars.ABSENT
        self._max_norm: Norm | None = None
        self.facts = 0
        self.skipped: bool | Tensor = False

    def _sets(self) -> list[ClipSet]:
        """The sets, without their gradients."""
        sets, settings = [], self._settings
        together: list[Tensor] | None = None
        names = settings.names.of_sets(self._held, settings.each)
        for group, of_group in zip(self._held, names, strict=True):
            parameters, own = group.parameters, self._own[id(group.values)]
            if own is None and settings.scope == "global":
                together = together + parameters if together else parameters
            else:
                sets.append(ClipSet(parameters, own, settings.each, of_group))
        # Even without gradients here, another rank of the group may wait for this one.
        if together or (together is not None and settings.groups):
            sets.append(ClipSet(together, None, settings.each, ["all"]))
        return sets

    def again(self) -> Snapshot:
        """The gradients as they are now, as user code may have changed them; groups keep their thresholds."""
        return Snapshot(self._optimizers, self._settings, self._only, self._own)

    @property
    def grads(self) -> list[Tensor]:
        """The gradients, set by set."""
        return [grad for clip_set in self.sets for grad in clip_set.batch.all]

    def measure(self) -> None:
        """Measure the norms of the sets, and that of all gradients."""
        self.measure_sets(self.sets)
        for clip_set in self.sets:
            self.facts |= clip_set.batch.facts
        if self._overlap and self._settings.groups is None:
            # A gradient that several sets share counts once.  With `group`, only some ranks may share a
            # gradient, and all of them would have to exchange another norm: there it counts in each set.
            norms = scalars.in_one([self._all().norm(self._settings.order)])
            self.total_norm = unscaled(norms, self.grad_scale, self._settings.order)[0]
        else:
            self.total_norm = self.joint_norm()

    def measure_sets(self, sets: Sequence[ClipSet], finite: bool = False) -> None:
        """Measure the norms of some sets, or of their finite elements, divided by a GradScaler's scale.

        Ranks exchange the norms of all sets at once.
        """
        order, each = self._settings.order, self._settings.each
        norms = gather.norms_of([clip_set.batch for clip_set in sets], each, order, finite)
        for clip_set, of_set in zip(sets, norms, strict=True):
            of_each = of_set if each else scalars.in_one([cast("Norm", of_set)])
            clip_set.norms = unscaled(cast("Norms", of_each), self.grad_scale, order)

    def optimizers_from(self, first: int) -> list[int]:
        """The numbers of the optimizers whose gradients these are, after that of the one about to step."""
        return [*dict.fromkeys([first, *(group.optimizer for group in self._held)])]

    def joint_norm(self) -> Norm:
        """The joint norm of the sets when they were last measured."""
        return joint_norms.join(
            scalars.concatenate([clip_set.norms for clip_set in self.sets]), self._settings.order
        )

    def set_thresholds(self) -> None:
        """Set the threshold of each set: that of its parameter group, or what the bank answers.

        Nothing is learned of a step that is skipped.
        """
        bank, asked = self._settings.bank, []
        for clip_set in self.sets:
            if clip_set.own is None:
                asked.append(clip_set)
            else:
                clip_set.limit(clip_set.own, scalars.EPS)
        if not asked:
            return
        names, norms = self._observed(asked) if bank.learns else ([], [])
        max_norms = bank.max_norms(names, norms, self._settings.order)
        start = 0
        for clip_set in asked:
            end = start + len(clip_set.norms)
            clip_set.limit(max_norms if isinstance(max_norms, float) else max_norms[start:end], bank.eps)
            start = end

    def _observed(self, sets: Sequence[ClipSet]) -> tuple[list[str], Norms]:
        """What thresholds learn from: the names of some sets, and their norms."""
        names = sets[0].names() if len(sets) == 1 else [name for each in sets for name in each.names()]
        norms = scalars.concatenate([clip_set.norms for clip_set in sets])
        if self.repeats and self._settings.each:
            # Thresholds that join the norms count a gradient of several optimizers once.
            norms = scalars.replaced(norms, _repeated(sets), scalars.ABSENT)
        return names, scalars.replaced(norms, self.skipped, math.nan)

    def take_decisions_of(self, other: Snapshot) -> None:
        """Take the norms and decisions from another snapshot of the same gradients."""
        self.total_norm, self.facts, self.skipped = other.total_norm, other.facts, other.skipped
        for clip_set, same in zip(self.sets, other.sets, strict=True):
            clip_set.norms, clip_set.max_norms, clip_set.clip_coefs, clip_set.is_zeroed = (
                same.norms,
                same.max_norms,
                same.clip_coefs,
                same.is_zeroed,
            )

    def limit_all(self, clip_coef: Norm, max_norm: Norm) -> None:
        """Limit all clip coefficients to a number, which a threshold for all gradients gave."""
        if scalars.may_change(clip_coef):
            self._max_norm = max_norm
            for clip_set in self.sets:
                clip_set.clip_coefs = scalars.at_most(clip_set.clip_coefs, clip_coef)

    def keep_if_skipped(self) -> None:
        """Multiply by 1 if the step is skipped and the host does not know it."""
        for clip_set in self.sets:
            clip_set.clip_coefs = scalars.replaced(clip_set.clip_coefs, self.skipped, 1.0)

    def held_norms(self) -> list[list[float]]:
        """The norms of this rank's part of each set, if its norms involve other ranks."""
        found, order = [], self._settings.order
        for clip_set in self.sets:
            if clip_set.batch.facts & Facts.SHARDED:
                clip_set.names()  # before any user code runs
                held = gather.local_gradients(clip_set.parameters)
                found.append(
                    scalars.numbers(held.norms(order)) if clip_set.each else [float(held.norm(order))]
                )
        return found

    def max_norm(self) -> Norm:
        """The smallest threshold of the sets that have gradients."""
        present = [clip_set for clip_set in self.sets if not clip_set.is_absent()] or self.sets
        max_norms = [clip_set.max_norms for clip_set in present if len(clip_set.norms)]
        of_sets: list[Norms] = [[each] if isinstance(each, float) else each for each in max_norms]
        of_all = [] if self._max_norm is None else [scalars.in_one([self._max_norm])]
        return scalars.smallest([*of_sets, *of_all], math.inf)

    def clip_coef(self) -> Norm:
        """The smallest clip coefficient."""
        return scalars.smallest([clip_set.clip_coefs for clip_set in self.sets], 1.0)

    def zero_nonfinite_(self) -> None:
        """Set non-finite elements to 0 in place, where that was decided."""
        for clip_set in self.sets:
            if clip_set.is_zeroed:
                clip_set.batch.zero_nonfinite_()

    def scale_but_(self, optimizers: Collection[int]) -> None:
        """Multiply in place the gradients of all but some optimizers, by one number for all."""
        rest = [p for group in self._held if group.optimizer not in optimizers for p in group.parameters]
        gather.gradients(rest).scale_(self.sets[0].clip_coefs[0])

    def scale_(self) -> None:
        """Multiply the gradients in place; those that several sets share, by the smallest number."""
        if not self._overlap:
            for clip_set in self.sets:
                clip_set.scale_()
            return
        of_grad: dict[int, list[Norm]] = {}
        for clip_set in self.sets:
            for i, grad in enumerate(clip_set.batch.all):
                of_grad.setdefault(id(grad), []).append(clip_set.clip_coefs[i if clip_set.each else 0])
        batch = self._all()
        clip_coefs = [joint_norms.join(of_grad[id(grad)], -math.inf) for grad in batch.all]
        batch.scale_each_(scalars.in_one(clip_coefs))

    def _all(self) -> Batch:
        return gather.gradients([p for group in self._held for p in group.parameters], self._settings.groups)


def _repeated(sets: Iterable[ClipSet]) -> list[bool]:
    """Whether each gradient of some sets was there before."""
    grads = [id(grad) for each in sets for grad in each.batch.all]
    first = {grad: place for place, grad in reversed(list(enumerate(grads)))}
    return [first[grad] < place for place, grad in enumerate(grads)]


def own_max_norms(groups: Iterable[Group], known: OwnMaxNorms) -> dict[int, float | None]:
    """Each parameter group's own threshold, or None, by the id of the group.

    Args:
        groups: the groups.
        known: the thresholds of some groups, which are not read again.
    """
    return {
        id(group.values): known[id(group.values)] if id(group.values) in known else _own(group)
        for group in groups
    }


def _own(group: Group) -> float | None:
    if "max_norm" not in group.values:
        return None
    own = group.values["max_norm"]
    return math.inf if own is None else arguments.threshold(group.place("max_norm"), own)


def set_names(groups: Sequence[Group], settings: Settings) -> dict[str, bool]:
    """The names of the norms of all possible sets, and whether thresholds are asked for each at present."""
    asked = ["max_norm" not in group.values for group in groups]
    if settings.scope == "global":
        return {"all": any(asked)}
    names = settings.names.of_sets(groups, settings.each)
    return {name: is_asked for each, is_asked in zip(names, asked, strict=True) for name in each}
