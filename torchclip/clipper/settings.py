"""What a user asks of a Clipper: its arguments, checked, as one object."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchclip._core import arguments
from torchclip._core.ranks import meshes
from torchclip.clipper.mean_loss import check_ranks_known
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


@dataclass(frozen=True, eq=False)
class Settings:
    """What a user asks of a Clipper.

    Attributes:
        bank: the thresholds.
        rule: the rule for gradients that are not clipped to a norm; None if all are.
        own_scope: which gradients are clipped together, as the user says.
        norm_type: the order of the norms.
        nonfinite: what to do about a norm that is not finite.
        nonfinite_skips: how many steps in a row were skipped because of that.
        skip_above: which steps are skipped because their norm is too large; None for none.
        skip_loss_above: which steps are skipped because their loss is too large; None for none.
        groups: the process groups whose other ranks have further gradients; None for none.
        on_clip: the function to tell of each step.
        names: the names of the parameters.
        layers_every: how often, in steps, the norms of single parameters are recorded; 0 for never.
        updates: whether their updates are recorded in these steps, too.
    """

    bank: ThresholdBank
    rule: Rule | None
    own_scope: Scope
    norm_type: float
    nonfinite: Nonfinite
    nonfinite_skips: InARow
    skip_above: SkipAbove | None
    skip_loss_above: SkipAbove | None
    groups: Sequence[ProcessGroup] | None
    on_clip: Callable[[Record], object] | None
    names: Names
    layers_every: int
    updates: bool

    @cached_property
    def scope(self) -> Scope:
        """Which gradients are clipped together; thresholds of single parameters say it themselves."""
        return "parameter" if self.bank.per_parameter else self.own_scope

    @cached_property
    def each(self) -> bool:
        """Whether each gradient is clipped by itself."""
        return self.scope == "parameter"

    @cached_property
    def always_changes(self) -> bool:
        """Whether the norm may change though no coefficient is below 1."""
        return self.rule is not None or self.nonfinite == "zero"

    @cached_property
    def limits(self) -> list[SkipAbove]:
        """What skips steps that are above a limit."""
        return [each for each in (self.skip_above, self.skip_loss_above) if each is not None]

    @cached_property
    def may_refuse(self) -> bool:
        """Whether a step may be skipped, raise an error, or be taken without some elements."""
        return self.nonfinite != "propagate" or bool(self.limits)

    @cached_property
    def may_skip(self) -> bool:
        """Whether the Clipper may skip steps."""
        return self.nonfinite == "skip" or bool(self.limits)

    @cached_property
    def counts(self) -> list[InARow]:
        """How many steps in a row were skipped, for each reason."""
        counts = [self.nonfinite_skips] if self.nonfinite == "skip" else []
        return [*counts, *(limit.skips for limit in self.limits)]

    @cached_property
    def memories(self) -> list[ThresholdBank | InARow]:
        """What learns and counts from step to step."""
        banks = [self.bank, *(limit.bank for limit in self.limits)]
        return [*(bank for bank in banks if bank.learns), *self.counts]

    def with_max_norm(self, max_norm: MaxNorm | Rule) -> Settings:
        """The same with another threshold or rule, which is checked."""
        bank, rule = _limit_of(max_norm)
        scope = "AdaGC" if bank.per_parameter else self.own_scope
        return replace(self, bank=bank, rule=rule, groups=_process_groups_of(self.groups, scope))


def checked(
    optimizers: Sequence[Optimizer],
    max_norm: MaxNorm | Rule,
    *,
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
) -> Settings:
    """The arguments of a Clipper, or an error that says what is wrong with one."""
    _check_choices(scope, nonfinite, on_clip)
    limits = {"skip_above": skip_above, "skip_loss_above": skip_loss_above}
    _check_lbfgs(optimizers, nonfinite, limits)
    most = _max_skips_of(max_skips, nonfinite, limits)
    bank, rule = _limit_of(max_norm)
    order = _norm_type_of(norm_type, nonfinite)
    names = Names(optimizers, model)
    groups = _process_groups_of(group, "AdaGC" if bank.per_parameter else scope)
    return Settings(
        bank=bank,
        rule=rule,
        own_scope=scope,
        norm_type=order,
        nonfinite=nonfinite,
        nonfinite_skips=InARow(most if nonfinite == "skip" else None),
        skip_above=None if skip_above is None else SkipAbove(skip_above, most, order),
        skip_loss_above=_loss_limit_of(skip_loss_above, most, optimizers, groups, names),
        groups=groups,
        on_clip=on_clip,
        layers_every=_layers_every_of(layers_every, updates),
        updates=updates,
        names=names,
    )


def _check_choices(scope: Any, nonfinite: Any, on_clip: Any) -> None:
    """Raise an error for an unknown scope or policy, and for what cannot be told of steps."""
    arguments.option("scope", scope, get_args(Scope))
    arguments.option("nonfinite", nonfinite, get_args(Nonfinite))
    if on_clip is not None and not callable(on_clip):
        raise TypeError(f"`on_clip` must be callable, got {arguments.shown(on_clip)}")


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


def _loss_limit_of(
    skip_loss_above: MaxNorm | None,
    most: int | None,
    optimizers: Sequence[Optimizer],
    groups: Sequence[ProcessGroup] | None,
    names: Names,
) -> SkipAbove | None:
    """What skips steps by their loss, if anything does; it must be known which ranks decide together."""
    if skip_loss_above is None:
        return None
    check_ranks_known(optimizers, groups, names)
    return SkipAbove(skip_loss_above, most, 1.0, "loss")


def _layers_every_of(layers_every: int, updates: bool) -> int:
    """How often single parameters are sampled; updates are recorded in the same steps."""
    every = arguments.count("layers_every", layers_every, least=0)
    if arguments.flag("updates", updates) and not every:
        raise ValueError(
            "`updates` records the updates of the steps that `layers_every` samples; pass `layers_every`, "
            "such as 100, too"
        )
    return every


def _limit_of(max_norm: MaxNorm | Rule) -> tuple[ThresholdBank, Rule | None]:
    """The thresholds, and the rule if another one than a norm was passed."""
    # A tensor has a method with this name, too.
    if isinstance(max_norm, Rule) and not isinstance(max_norm, (type, Tensor)):
        return ThresholdBank(math.inf), max_norm
    return ThresholdBank(cast("MaxNorm", max_norm)), None


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
    skipping = [name for name, limit in limits.items() if limit is not None]
    if nonfinite == "skip" or skipping:
        argument, remedy = ("nonfinite='skip'", "use 'error' or 'zero'")
        if nonfinite != "skip":
            argument, remedy = (skipping[0], "do not pass it")
        raise ValueError(
            f"`{argument}` does not work with LBFGS, which moves the parameters several times in a step; "
            f"{remedy}"
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


def _process_groups_of(group: Any, scope: str) -> list[ProcessGroup] | None:
    """The process groups of a ``group``; None if there are none."""
    groups = meshes.as_groups(group) or None
    if groups and scope in ("AdaGC", "parameter"):
        what = scope if scope == "AdaGC" else "`scope='parameter'`"
        raise ValueError(
            f"`group` has no meaning with {what}, which clips each gradient by itself: do not pass it"
        )
    return groups


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
