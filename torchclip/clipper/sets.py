"""Which gradients are clipped together: sets of optimizers' gradients, each with a norm and a threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torchclip._core import arguments, gather, joint_norms, scalars
from torchclip._core.batch import Batch, Norm, Norms
from torchclip._core.ranks.exchange import Kind
from torchclip.clipper.optimizers import Group, groups_of, joined, unscaled
from torchclip.clipper.settings import Settings

_ALL = ["all"]


class ClipSet:
    """Gradients that are clipped together by one norm, or each by its own.

    It has no ``__init__``, as a step of a training has no time for one.

    Attributes:
        parameters: their parameters.
        own: the threshold of their own parameter group; None if the Clipper's applies.
        is_exempt: whether they are only measured, as their group says, and apart from all others.
        batch: the gradients.
        norms: their norms, or the one norm, without a GradScaler's scale.
        max_norms: a threshold for each norm, or one for all of them.
        clip_coefs: the clip coefficient for each norm.
        is_zeroed: whether their non-finite elements were set to 0.
    """

    parameters: Sequence[Tensor]
    own: float | None = None
    is_exempt = False
    batch: Batch
    norms: Norms
    max_norms: float | Norms = math.inf
    clip_coefs: Norms
    is_zeroed = False

    def is_finite(self) -> bool:
        """Whether all norms are known to be finite."""
        return isinstance(self.norms, list) and all(map(math.isfinite, self.norms))


class Gradients:
    """The gradients of some optimizers at one moment, in sets that are clipped together, and their norms.

    Args:
        optimizers: the optimizers.
        settings: what is clipped together.
        is_local: whether only this rank's part of them counts.

    Attributes:
        each: whether each of them has a norm and a threshold.
        sets: the sets.
        grad_scale: the GradScaler's scale by which they are multiplied.
        total_norm: the norm of all gradients but those of exempt groups, or of all if all groups are exempt;
            ``scalars.ABSENT`` if there are none.
        whole_norm: the norm of all of them, which shows whether any gradient is not finite.
        overlaps: whether several sets share a gradient.
    """

    def __init__(self, optimizers: Sequence[Optimizer], settings: Settings, is_local: bool = False) -> None:
        self.optimizers, self.is_local, self.overlaps = optimizers, is_local, False
        self._settings, self.each = settings, settings.each
        self.grad_scale = vars(optimizers[0]).get("grad_scale") if len(optimizers) == 1 else None
        try:
            self.sets = sets = _sets_of(optimizers, settings.scope)
        except (TypeError, ValueError):
            held = [group["params"] for each in optimizers for group in each.param_groups]
            gather.tell_ranks(held, settings.groups, self._kind)
            raise
        lists = []
        for clip_set in sets:
            lists.append(clip_set.parameters)
        if is_local:
            batches = [*map(gather.local_gradients, lists)]
            found = [*zip(batches, gather.norms_of(batches, self.each, settings.norm_type), strict=True)]
        else:
            found = gather.measured(lists, settings.groups, self.each, settings.norm_type)
        for i, clip_set in enumerate(sets):
            clip_set.batch, norm = found[i]
            clip_set.norms = [norm] if isinstance(norm, float) else norm
            if self.grad_scale is not None or clip_set.norms.__class__ is not list:
                clip_set.norms = self._unscaled(norm)
        if len(sets) > 1 or self.each:
            self._join_sets()
        else:
            self.total_norm = self.whole_norm = sets[0].norms[0]

    def _unscaled(self, norms: Any) -> Norms:
        """The norms of a set, or its one norm, without a GradScaler's scale."""
        if not self.each:
            norms = [norms] if isinstance(norms, float) else norms.reshape(1)
        return unscaled(norms, self.grad_scale, self._settings.norm_type)

    @property
    def _kind(self) -> str:
        return Kind.CLIP_EACH if self.each else Kind.CLIP

    @property
    def all(self) -> list[Tensor]:
        """The gradients, set by set."""
        return [grad for each in self.sets for grad in each.batch.all]

    @property
    def counted(self) -> list[ClipSet]:
        """The sets whose norms count: those that are not exempt, or all if none is."""
        return [each for each in self.sets if not each.is_exempt] or self.sets

    @property
    def facts(self) -> int:
        """``Facts`` about the gradients, those of all ranks if they are sharded."""
        facts = 0
        for each in self.sets:
            facts |= each.batch.facts
        return facts

    def zero_nonfinite_(self) -> bool:
        """Set non-finite elements to 0 in place, and measure the sets again that had any.

        On an accelerator this does not wait to find out which these are.

        Returns:
            Whether there may be any.
        """
        sets = [each for each in self.sets if not each.is_finite()]
        if not sets:
            return False
        batches = [each.batch for each in sets]
        gather.zero_nonfinite_(batches, [each.parameters for each in sets], self._settings.groups, self._kind)
        norms = gather.norms_of(batches, self.each, self._settings.norm_type)
        for clip_set, of_set in zip(sets, norms, strict=True):
            clip_set.is_zeroed = True
            clip_set.norms = _of_what_is_left(clip_set.norms, self._unscaled(of_set))
        return True

    def _join_sets(self) -> None:
        """Find the norm of all gradients from those of several sets."""
        norm_type = self._settings.norm_type
        if len(self.sets) == 1:
            self.total_norm = self.whole_norm = joint_norms.join(self.sets[0].norms, norm_type)
            return
        counted, self.overlaps = self.counted, _overlap(self.sets)
        self.total_norm = self.joint_norm(counted)
        self.whole_norm = self.total_norm if len(counted) == len(self.sets) else self.joint_norm(self.sets)

    def joint_norm(self, sets: Sequence[ClipSet]) -> Norm:
        """The joint norm of some sets when they were last measured."""
        norm_type = self._settings.norm_type
        joint = joint_norms.join(scalars.concatenate([each.norms for each in sets]), norm_type)
        if self.overlaps and self._settings.groups is None:
            # A gradient that several sets share counts once.  With `group`, only some ranks may share a
            # gradient, and all of them would have to exchange another norm: there it counts in each set.
            norm = gather.gradients(joined([each.parameters for each in sets])).norm(norm_type)
            norms = unscaled(scalars.in_one([norm]), self.grad_scale, norm_type)
            return scalars.replaced(norms, joint < 0, scalars.ABSENT)[0]
        return joint

    def observed(self, sets: Sequence[ClipSet]) -> tuple[list[str], Norms]:
        """What thresholds learn from: the names and norms of sets, those without a threshold of their own."""
        if self._settings.scope == "global":
            return _ALL, sets[0].norms
        of_groups = self._settings.names.of_sets(groups_of(self.optimizers), self.each)
        named = zip(self.sets, of_groups, strict=True)  # in such a scope each group is a set
        of_sets = [_present(each, names) if self.each else names for each, names in named if each.own is None]
        names = of_sets[0] if len(of_sets) == 1 else [name for of_set in of_sets for name in of_set]
        norms = scalars.concatenate([each.norms for each in sets])
        if self.each and len(self.optimizers) > 1:
            # Thresholds that join the norms count a gradient of several optimizers once.
            repeats = _repeated(sets)
            norms = scalars.replaced(norms, repeats, scalars.ABSENT) if any(repeats) else norms
        return names, norms

    # Changing

    def scale_(self, skipped: bool | Tensor) -> None:
        """Multiply the gradients in place; a gradient that several sets share, by the smallest number.

        Args:
            skipped: whether the step is skipped; by a value on a device, the numbers are then 1.
        """
        if not isinstance(skipped, bool):
            for clip_set in self.sets:
                clip_set.clip_coefs = scalars.replaced(clip_set.clip_coefs, skipped, 1.0)
        if len(self.sets) == 1 or not self.overlaps:
            for clip_set in self.sets:
                if self.each:
                    clip_set.batch.scale_each_(clip_set.clip_coefs)
                else:
                    clip_set.batch.scale_(clip_set.clip_coefs[0])
            return
        of_grad: dict[int, list[Norm]] = {}
        for clip_set in self.sets:
            for i, grad in enumerate(clip_set.batch.all):
                clip_coef = clip_set.clip_coefs[i if self.each else 0]
                of_grad.setdefault(id(grad), []).append(clip_coef)
        batch = gather.gradients(joined([each.parameters for each in self.sets]), self._settings.groups)
        clip_coefs = [joint_norms.join(of_grad[id(grad)], -math.inf) for grad in batch.all]
        batch.scale_each_(scalars.in_one(clip_coefs))


def own_max_norm(group: Group) -> float | None:
    """A parameter group's own threshold; None if it has none."""
    if "max_norm" not in group.values:
        return None
    own = group.values["max_norm"]
    return math.inf if own is None else arguments.threshold(group.place("max_norm"), own)


def _sets_of(optimizers: Sequence[Optimizer], scope: str) -> list[ClipSet]:
    """The sets without their gradients: of parameter groups in order, then of all others together."""
    sets: list[ClipSet] = []
    together: list[Sequence[Tensor]] = []
    clip_set = ClipSet()
    several, joint = len(optimizers) > 1, scope == "global"
    for i, optimizer in enumerate(optimizers):
        for j, values in enumerate(optimizer.param_groups):
            if "max_norm" in values:
                clip_set.own = own_max_norm(Group(i, j, several, values))
                clip_set.is_exempt = values["max_norm"] is None
            elif joint:
                together.append(values["params"])
                continue
            clip_set.parameters = values["params"]
            sets.append(clip_set)
            clip_set = ClipSet()
    if together:
        clip_set.parameters = together[0] if len(together) == 1 else joined(together)
        sets.append(clip_set)
    if not sets:  # an optimizer may have lost all its groups: then no threshold is asked
        clip_set.parameters, clip_set.own = [], math.inf
        sets.append(clip_set)
    return sets


def _of_what_is_left(norms: Norms, zeroed: Norms) -> Norms:
    """The norms of gradients whose non-finite elements were set to 0; ``ABSENT`` where nothing else is left.

    Args:
        norms: the norms before.
        zeroed: the norms afterwards.
    """
    is_empty: list[bool] | Tensor
    if isinstance(norms, list):
        both = zip(norms, scalars.numbers(zeroed), strict=True)
        is_empty = [after == 0 and not math.isfinite(before) for before, after in both]
    else:
        is_empty = (scalars.on_device(zeroed, norms.device) == 0) & ~norms.isfinite()
    return scalars.replaced(zeroed, is_empty, scalars.ABSENT)


def _overlap(sets: Sequence[ClipSet]) -> bool:
    """Whether a gradient is in several sets, such as one that parameters of two groups share."""
    grads = [id(grad) for each in sets for grad in each.batch.all]
    return len({*grads}) < len(grads)


def _present(clip_set: ClipSet, names: list[str]) -> list[str]:
    """The names of the parameters of a set that have a gradient; of those that share one, the last one's."""
    if len(clip_set.batch.all) == len(names):
        return names
    named = zip(clip_set.parameters, names, strict=True)
    of_grad = {id(p.grad): name for p, name in named if p.grad is not None}
    return [of_grad[id(grad)] for grad in clip_set.batch.all]


def _repeated(sets: Sequence[ClipSet]) -> list[bool]:
    """Whether each gradient of some sets was there before."""
    grads = [id(grad) for each in sets for grad in each.batch.all]
    first: dict[int, int] = {}
    return [first.setdefault(grad, place) < place for place, grad in enumerate(grads)]


def set_names(optimizers: Sequence[Optimizer], settings: Settings) -> dict[str, bool]:
    """The names of the norms of all possible sets, and whether thresholds are asked for each at present."""
    groups: Any = groups_of(optimizers)
    asked = ["max_norm" not in group.values for group in groups]
    if settings.scope == "global":
        return {"all": any(asked)}
    names = settings.names.of_sets(groups, settings.each)
    return {name: is_asked for each, is_asked in zip(names, asked, strict=True) for name in each}
