"""What a user asks of a Clipper: its arguments, checked, as one object."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchclip._core import arguments
from torchclip._core.ranks import meshes
from torchclip.clipper.mean_loss import groups_deciding
from torchclip.clipper.names import Names
from torchclip.clipper.skip_above import InARow, SkipAbove
from torchclip.history.history import History
from torchclip.history.records import Record
from torchclip.thresholds.bank import ThresholdBank
from torchclip.thresholds.base import MaxNorm, Rule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Scope = Literal["global", "group", "parameter"]
Nonfinite = Literal["propagate", "error", "skip", "zero"]


class Settings:
    """What a user asks of a Clipper; an argument with which a Clipper cannot work raises an error.

    Args:
        optimizers: the optimizers; all other arguments are those of the Clipper.

    Attributes:
        max_norm: the threshold or rule as it was passed; a number is a float.
        bank: the thresholds.
        rule: the rule for gradients that are not clipped to a norm; None if all are.
        scope: which gradients are clipped together; thresholds of single parameters say it themselves.
        each: whether each gradient is clipped by itself.
        norm_type: the order of the norms.
        nonfinite: what to do about a norm that is not finite.
        nonfinite_skips: how many steps in a row were skipped because of that.
        skip_above: which steps are skipped because their norm is too large; None for none.
        skip_loss_above: which steps are skipped because their loss is too large; None for none.
        limits: these two, without None.
        groups: the process groups whose other ranks have further gradients; None for none.
        on_clip: the function to tell of each step.
        names: the names of the parameters.
        layers_every: how often, in steps, the norms of single parameters are recorded; 0 for never.
        updates: whether their updates are recorded in these steps, too.
        may_skip: whether the Clipper may skip steps.
        may_refuse: whether a step may be skipped, raise an error, or be taken without some elements.
        always_changes: whether the norm may change though no coefficient is below 1.
        counts: how many steps in a row were skipped, for each reason.
        memories: what learns and counts from step to step.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        max_norm: MaxNorm | Rule,
        norm_type: float | str,
        scope: Scope,
        nonfinite: Nonfinite,
        group: Any,
        on_clip: Callable[[Record], object] | None,
        model: nn.Module | Sequence[nn.Module] | None,
        skip_above: MaxNorm | None,
        skip_loss_above: MaxNorm | None,
        max_skips: int | None,
        layers_every: int,
        updates: bool,
    ) -> None:
        self._own_scope: Scope = arguments.option("scope", scope, get_args(Scope))
        self.nonfinite: Nonfinite = arguments.option("nonfinite", nonfinite, get_args(Nonfinite))
        if on_clip is not None and not callable(on_clip):
            raise TypeError(f"`on_clip` must be callable, got {arguments.shown(on_clip)}")
        self.on_clip = on_clip
        limits = {"skip_above": skip_above, "skip_loss_above": skip_loss_above}
        _check_lbfgs(optimizers, nonfinite, limits)
        most = _max_skips_of(max_skips, nonfinite, limits)
        self.norm_type = _norm_type_of(norm_type, nonfinite)
        self.nonfinite_skips = InARow(most if nonfinite == "skip" else None)
        self.skip_above = None if skip_above is None else SkipAbove(skip_above, most, self.norm_type)
        self.skip_loss_above = None
        if skip_loss_above is not None:
            self.skip_loss_above = SkipAbove(skip_loss_above, most, 1.0, "loss")
        self.limits = [each for each in (self.skip_above, self.skip_loss_above) if each is not None]
        self.may_skip = nonfinite == "skip" or bool(self.limits)
        self.may_refuse = nonfinite != "propagate" or bool(self.limits)
        self.counts = [self.nonfinite_skips] if nonfinite == "skip" else []
        self.counts += [limit.skips for limit in self.limits]
        self.groups: list[ProcessGroup] | None = meshes.as_groups(group) or None
        self._set_max_norm(max_norm)
        self.layers_every, self.updates = _layers_every_of(layers_every, updates), updates
        self.names = Names(optimizers, model)
        if self.skip_loss_above is not None:
            groups_deciding(optimizers, self.groups, self.names)

    def _set_max_norm(self, max_norm: MaxNorm | Rule) -> None:
        # A tensor has a method with this name, too.
        is_rule = isinstance(max_norm, Rule) and not isinstance(max_norm, (type, Tensor))
        self.rule = cast("Rule", max_norm) if is_rule else None
        self.bank = ThresholdBank(math.inf if is_rule else cast("MaxNorm", max_norm))
        self.max_norm: MaxNorm | Rule = max_norm if is_rule else self.bank.given
        self.scope: Scope = "parameter" if self.bank.per_parameter else self._own_scope
        self.each = self.scope == "parameter"
        if self.groups and self.each:
            what = "AdaGC" if self.bank.per_parameter else "`scope='parameter'`"
            raise ValueError(
                f"`group` has no meaning with {what}, which clips each gradient by itself: do not pass it"
            )
        self.always_changes = is_rule or self.nonfinite == "zero"
        banks = [self.bank, *(limit.bank for limit in self.limits)]
        self.memories: list[ThresholdBank | InARow] = [*(bank for bank in banks if bank.learns), *self.counts]

    def with_max_norm(self, max_norm: MaxNorm | Rule) -> Settings:
        """The same with another threshold or rule, which is checked."""
        changed = copy.copy(self)
        changed._set_max_norm(max_norm)
        return changed


def _max_skips_of(
    max_skips: int | None, nonfinite: Nonfinite, limits: Mapping[str, MaxNorm | None]
) -> int | None:
    """How many steps in a row may be skipped, if any are."""
    if max_skips is None:
        return None
    if nonfinite != "skip" and all(limit is None for limit in limits.values()):
        raise ValueError(
            "`max_skips` limits how many steps in a row are skipped; pass `skip_above`, `skip_loss_above` or "
            "`nonfinite='skip'`, too"
        )
    return arguments.count("max_skips", max_skips, least=1)


def _layers_every_of(layers_every: int, updates: bool) -> int:
    """How often single parameters are sampled; updates are recorded in the same steps."""
    every = arguments.count("layers_every", layers_every, least=0)
    if arguments.flag("updates", updates) and not every:
        raise ValueError(
            "`updates` records the updates of the steps that `layers_every` samples; pass `layers_every`, "
            "such as 100, too"
        )
    return every


def _check_lbfgs(
    optimizers: Sequence[Optimizer], nonfinite: Nonfinite, limits: Mapping[str, MaxNorm | None]
) -> None:
    """Raise an error for LBFGS together with what its steps cannot do."""
    if not any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        return
    if len(optimizers) > 1:
        raise ValueError(
            "`optimizer` includes LBFGS, which computes new gradients several times in a step; make a "
            "Clipper for it alone"
        )
    skipping = ["nonfinite='skip'"] * (nonfinite == "skip")
    skipping += [name for name, limit in limits.items() if limit is not None]
    if skipping:
        raise ValueError(
            f"`{skipping[0]}` does not work with LBFGS, which moves the parameters several times in a step; "
            "use nonfinite='error' or 'zero', and no limit above which steps are skipped"
        )


def _norm_type_of(norm_type: float | str, nonfinite: Nonfinite) -> float:
    """The order of the norms, which must show non-finite gradients if a policy needs that."""
    order = arguments.norm_type_of(norm_type)
    if order <= 0 and nonfinite != "propagate":
        raise ValueError(
            f"`nonfinite={nonfinite!r}` depends on the norm, and a norm of order {order} may be finite "
            "though a gradient is not; pass an order above 0 as `norm_type`, or use 'propagate'"
        )
    return order


def check_history(history: Any) -> None:
    """Raise an error for anything but a history, and for one of another Clipper."""
    if not isinstance(history, History):
        raise TypeError(
            "`history` must be a torchclip.history.History, such as History(maxlen=1000), got "
            f"{arguments.shown(history)}"
        )
    if history._is_followed:
        raise ValueError(
            "`history` already belongs to another Clipper, and would mix the steps of both; pass a new one"
        )
