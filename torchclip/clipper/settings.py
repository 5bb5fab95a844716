"""What a user asks of a Clipper: its arguments, checked, as one object."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchclip._core import arguments
from torchclip._core.ranks import meshes
from torchclip.clipper.names import Names
from torchclip.clipper.spikes import Spikes
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
        count: the number of optimizers.
        bank: the thresholds.
        rule: the rule for gradients that are not clipped to a norm; None if all are.
        scope: which gradients are clipped together.
        order: the order of the norms.
        nonfinite: what to do about a norm that is not finite.
        spikes: which steps are skipped because their norm is too large; None for none.
        groups: the process groups whose other ranks have further gradients; None for none.
        on_clip: the function to call before anything changes.
        names: the names of the parameters.
        layers_every: how often, in steps, the norms of single parameters are recorded; 0 for never.
        joins_norms: whether thresholds of single parameters join their norms, as AdaGC does in its warm-up.
    """

    count: int
    bank: ThresholdBank
    rule: Rule | None
    scope: Scope
    order: float
    nonfinite: Nonfinite
    spikes: Spikes | None
    groups: Sequence[ProcessGroup] | None
    on_clip: Callable[[Record], object] | None
    names: Names
    layers_every: int
    joins_norms: bool

    @cached_property
    def several(self) -> bool:
        """Whether several optimizers step together."""
        return self.count > 1

    @cached_property
    def each(self) -> bool:
        """Whether each gradient is clipped by itself."""
        return self.scope == "parameter"

    @cached_property
    def may_skip(self) -> bool:
        """Whether steps are skipped by the Clipper, and not by a GradScaler alone."""
        return self.nonfinite == "skip" or self.spikes is not None or self.several

    @cached_property
    def banks(self) -> list[ThresholdBank]:
        """The thresholds for clipping and for skipping."""
        return [self.bank] if self.spikes is None else [self.bank, self.spikes.bank]

    @cached_property
    def asks_user_code(self) -> bool:
        """Whether thresholds are the user's own code."""
        return any(bank.runs_user_code for bank in self.banks)

    def usual_way(self) -> object:
        """How the kernel clips in one call, for its ``RoundState``; None if it cannot."""
        is_unusual = self.on_clip is not None or self.spikes is not None or self.groups is not None
        if is_unusual or self.order != 2 or self.layers_every:
            return None
        if self.rule is not None:
            # The kernel's name for the rule, and the attributes with its numbers.
            known = type(self.rule).__module__.startswith("torchclip.") and self.scope == "global"
            usual = getattr(self.rule, "usual", None) if known else None
            return None if usual is None else (usual[0], self.rule, *usual[1:])
        if self.each:
            return None if self.bank.number is None else ("each", self.bank.number)
        if self.scope == "group" or self.bank.runs_user_code:
            return None
        return self.bank.max_norm_of_all if self.bank.learns else self.bank.number


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
    max_skips: int | None,
    layers_every: int,
) -> Settings:
    """The arguments of a Clipper, or an error that says what is wrong with one."""
    arguments.option("scope", scope, get_args(Scope))
    arguments.option("nonfinite", nonfinite, get_args(Nonfinite))
    _refuse_lbfgs(optimizers, nonfinite, skip_above)
    if max_skips is not None and skip_above is None:
        raise ValueError("`max_skips` limits how often `skip_above` skips; pass `skip_above`, too")
    if on_clip is not None and not callable(on_clip):
        raise TypeError(f"`on_clip` must be callable, got {arguments.shown(on_clip)}")
    several = len(optimizers) > 1
    # A tensor has a method with this name, too.
    is_rule = isinstance(max_norm, Rule) and not isinstance(max_norm, (type, Tensor))
    bank = ThresholdBank(math.inf if is_rule else cast("MaxNorm", max_norm), in_rounds=several)
    order = _order_of(norm_type, nonfinite)
    return Settings(
        count=len(optimizers),
        bank=bank,
        rule=cast("Rule", max_norm) if is_rule else None,
        scope="parameter" if bank.per_parameter else scope,
        order=order,
        nonfinite=nonfinite,
        spikes=None if skip_above is None else Spikes(skip_above, max_skips, order, several),
        groups=_process_groups_of(group, "AdaGC" if bank.per_parameter else scope),
        on_clip=on_clip,
        layers_every=arguments.count("layers_every", layers_every, least=0),
        names=Names(optimizers, model),
        joins_norms=bank.per_parameter and getattr(max_norm, "max_norm", 0.0) < math.inf,
    )


def optimizers_of(given: Any, taken: Container[Optimizer]) -> list[Optimizer]:
    """The optimizers that a user passes, or an error that says what to pass.

    Args:
        given: an optimizer, or a list or tuple of them.
        taken: the optimizers that already have a Clipper.
    """
    optimizers = list(given) if isinstance(given, (list, tuple)) else [given]
    if not optimizers:
        raise ValueError("`optimizer` is an empty list; pass an optimizer, or those that step together")
    for i, optimizer in enumerate(optimizers):
        name = "`optimizer`" if optimizer is given else f"`optimizer` (item {i} of the list)"
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"{name} must be a torch.optim.Optimizer, or a list of those that step together, got "
                f"{arguments.shown(optimizer)}; for a wrapper, pass the optimizer that it wraps"
            )
        if not takes_hooks(optimizer) or not isinstance(optimizer.state, MutableMapping):
            raise TypeError(
                f"{name} is a wrapper without hooks ({type(optimizer).__name__}); pass the optimizer "
                "that it wraps"
            )
        if optimizer in taken:
            raise ValueError(f"{name} already has a Clipper; call its detach() first")
        if any(optimizer is other for other in optimizers[:i]):
            raise ValueError(f"{name} is in the list twice; pass each optimizer once")
    return optimizers


def takes_hooks(optimizer: Optimizer) -> bool:
    """Whether an optimizer can have hooks, which most wrappers of optimizers cannot."""
    try:
        optimizer.register_step_pre_hook(lambda *_: None).remove()
    except (AttributeError, TypeError):
        return False
    return True


def _refuse_lbfgs(optimizers: Sequence[Optimizer], nonfinite: Nonfinite, skip_above: MaxNorm | None) -> None:
    """Raise an error for LBFGS together with what its steps cannot do."""
    if not any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        return
    if len(optimizers) > 1:
        raise ValueError(
            "`optimizer` includes LBFGS, which computes new gradients several times in a step; make a "
            "Clipper for it alone"
        )
    if nonfinite == "skip" or skip_above is not None:
        argument, remedy = ("nonfinite='skip'", "use 'error' or 'zero'")
        if nonfinite != "skip":
            argument, remedy = ("skip_above", "do not pass it")
        raise ValueError(
            f"`{argument}` does not work with LBFGS, which moves the parameters several times in a step; "
            f"{remedy}"
        )


def _order_of(norm_type: float | str, nonfinite: Nonfinite) -> float:
    """The order of the norms, which must show non-finite gradients if a policy needs that."""
    order = arguments.norm_order(norm_type)
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


def refuse_history(history: Any) -> None:
    """Raise an error for anything but a history, and for one of another Clipper."""
    if not isinstance(history, History):
        raise TypeError(
            "`history` must be a torchclip.history.History, such as History(maxlen=1000), got "
            f"{arguments.shown(history)}"
        )
    if history.is_followed:
        raise ValueError(
            "`history` already belongs to another Clipper, and would mix the steps of both; pass a new one"
        )
