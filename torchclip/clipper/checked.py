"""Checks of a Clipper's arguments, and what they require of a step."""

from __future__ import annotations

import math
from collections.abc import Container, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch.optim import Optimizer

from torchclip._core import arguments, mesh
from torchclip.clipper.nonfinite import Nonfinite
from torchclip.clipper.scope import Scope, groups_of
from torchclip.history.history import History
from torchclip.thresholds.bank import ThresholdBank
from torchclip.thresholds.base import MaxNorm, Rule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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


def refuse_lbfgs(optimizers: Sequence[Optimizer], nonfinite: Nonfinite, skip_above: MaxNorm | None) -> None:
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


def alive(optimizers: Sequence[ref[Optimizer]], classes: Sequence[str]) -> tuple[Optimizer, ...]:
    """The optimizers, or an error if one is gone; ``classes`` are the names of their classes."""
    found = [optimizer() for optimizer in optimizers]
    if None in found:
        raise RuntimeError(
            f"the optimizer ({classes[found.index(None)]}) is gone, as a Clipper does not keep it alive; "
            "keep a reference to it"
        )
    return tuple(optimizer for optimizer in found if optimizer is not None)


def refuse_options(on_clip: Any, skip_above: MaxNorm | None, max_skips: int | None) -> None:
    """Raise an error for options that make no sense together."""
    if max_skips is not None and skip_above is None:
        raise ValueError("`max_skips` limits how often `skip_above` skips; pass `skip_above`, too")
    if on_clip is not None and not callable(on_clip):
        raise TypeError(f"`on_clip` must be callable, got {arguments.shown(on_clip)}")


def order_of(norm_type: float | str, nonfinite: Nonfinite) -> float:
    """The order of the norms, which must show non-finite gradients if a policy needs that."""
    order = arguments.norm_order(norm_type)
    if order <= 0 and nonfinite != "propagate":
        raise ValueError(
            f"`nonfinite={nonfinite!r}` depends on the norm, and a norm of order {order} may be finite "
            "though a gradient is not; pass an order above 0 as `norm_type`, or use 'propagate'"
        )
    return order


def process_groups_of(group: Any, scope: str) -> list[ProcessGroup] | None:
    """The process groups of a ``group``; None if there are none."""
    groups = mesh.as_groups(group) or None
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


def needs_all(
    scope: Scope,
    rule: ThresholdBank,
    skips: bool,
    has_group: bool,
    joins_norms: bool,
    optimizers: Sequence[Optimizer],
) -> str | None:
    """The option that needs the gradients of all optimizers before any can step; None if there is none."""
    if skips:
        return "`skip_above`"
    if has_group:
        return "`group`"
    if joins_norms:
        return "the warm-up of AdaGC, with a finite `max_norm`,"
    together = any("max_norm" not in group.values for group in groups_of(optimizers))
    if scope == "global" and rule.number != math.inf and together:
        return "one threshold for all of them (`scope='global'`)"
    return None


def usual_way(rule: ThresholdBank, way: Rule | None, scope: Scope) -> object:
    """How the kernel clips in one call, for its ``RoundState``; None if it cannot."""
    if way is not None:
        # The kernel's name for the rule, and the attributes with its numbers.
        usual = getattr(way, "usual", None) if type(way).__module__.startswith("torchclip.") else None
        return (usual[0], way, *usual[1:]) if usual is not None and scope == "global" else None
    if scope == "parameter":
        return None if rule.number is None else ("each", rule.number)
    if scope == "group" or rule.runs_user_code:
        return None
    if not rule.learns:
        return rule.number
    return rule.max_norm_of_all
