"""Whether all ranks clip by the same norm, and whether it is the norm of all gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from torchclip._core import arguments
from torchclip._core.ranks import meshes
from torchclip.clipper.clipper import Clipper
from torchclip.ranks_report import wording
from torchclip.ranks_report.facts import call_off, gathered, held_here
from torchclip.ranks_report.judgment import connections, is_right, parameters_of, passed
from torchclip.ranks_report.recommendation import InCode, advice

_NAMED = "model.named_parameters()"
_POSITIONS = '((f"[{i}]", p) for i, p in enumerate(parameters))'


@dataclass(frozen=True)
class RanksReport:
    """What ``check_ranks`` found.  ``print(report)`` says it in words.

    Attributes:
        ok: whether the call counts each gradient once on every rank, and replicas have the same gradients.
        norm: the 2-norm of all gradients, each counted once.
        norms: the norm that the call would return on each rank.
        local: the names of parameters that differ between ranks, or that some ranks do not have, so that
            clipping needs a ``group``.
        different: the names of parameters whose replicas have different gradients, or lack one.
        missing: the ranks without a parameter, by the name of the parameter.
        call: what to do, as code; or ``"nothing to do"``.
        seconds: how long the check took on this rank.
    """

    ok: bool
    norm: float
    norms: list[float]
    local: list[str]
    different: list[str]
    missing: dict[str, tuple[int, ...]]
    call: str
    seconds: float = field(compare=False)
    _words: str = field(repr=False)

    def __str__(self) -> str:
        return f"{self._words}\nThe check took {self.seconds:.2f} s."


def check_ranks(
    model_or_optimizer_or_parameters_or_clipper: nn.Module
    | Optimizer
    | Sequence[Optimizer]
    | Clipper
    | Tensor
    | Iterable[Tensor],
    *,
    group: ProcessGroup | Sequence[ProcessGroup] | None = None,
) -> RanksReport:
    """Check whether all ranks would clip by the same norm, and whether this is the norm of all gradients.

    A clipping call cannot know this: a plain tensor may be a replica, a shard or another expert.  This
    check compares the weights and the gradients of all ranks.  Call it once, after a backward pass, on all
    ranks of the default process group:

        report = torchclip.check_ranks(model)
        if torch.distributed.get_rank() == 0:
            print(report)

    Parameters are compared by name.  Ranks with the same weight have *replicas*, and the gradients of
    replicas must be the same.  Two tensors are the same if they differ by at most 1e-5 of their norm.  If
    ranks have different weights of the same name, as experts do, or if some ranks do not have a parameter, as
    in a pipeline, clipping needs a ``group``, and the report says which.  The parts of a DTensor are not
    replicas: a part is compared with the parts at the same coordinate of the mesh.

    Replicas that an optimizer has moved apart look like experts, so check before its first step, too.
    Tensors are compared by four random projections.  These mistake a difference of 1e-4 of the norm for
    rounding once in some thousand times, and larger differences more rarely.

    Args:
        model_or_optimizer_or_parameters_or_clipper: a module, an optimizer or a list of optimizers, tensors,
            or a ``Clipper``.  A Clipper's groups with ``max_norm=None`` are left out, as it does not clip
            them.  Parameters of a list, and of an optimizer without names, are compared by position.
        group: the ``group`` of the ``clip_grad_norm_`` call to check.  All ranks of the default process group
            are compared in any case.  A ``Clipper`` has its own ``group``.

    Returns:
        The same report on all ranks.

    Raises:
        TypeError: for any other argument.
        ValueError: for a ``group`` together with a ``Clipper``, or a parameter on the device 'meta'.
        RuntimeError: on the other ranks, if one rank refuses its arguments.

    Examples:
        >>> import torch
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> report = check_ranks(weight)
        >>> report.ok, report.norm, report.call
        (True, 5.0, 'nothing to do')
    """
    start = time.perf_counter()
    try:
        named, groups, code = _subject(model_or_optimizer_or_parameters_or_clipper, group)
        held = held_here(named)
    except Exception:
        call_off()
        raise
    of_ranks = gathered(held, groups)
    parameters = parameters_of(of_ranks)
    clipped = {name: each for name, each in parameters.items() if each.has_gradient}
    alone = connections([], len(of_ranks))
    used = connections(passed(of_ranks), len(of_ranks))
    of_connected = {
        some: math.hypot(*(norm for each in clipped.values() for norm in each.counted(some)))
        for some in set(used)
    }
    norm = math.hypot(*(norm for each in clipped.values() for norm in each.norms()))
    norms = [of_connected[some] for some in used]
    different = [name for name, each in clipped.items() if each.different]
    todo = advice(clipped, of_ranks, code, used)
    return RanksReport(
        ok=not different and all(is_right(used, each.pattern) for each in clipped.values()),
        norm=norm,
        norms=norms,
        local=[name for name, each in clipped.items() if not is_right(alone, each.pattern)],
        different=different,
        missing={name: each.missing for name, each in parameters.items() if each.missing},
        call="\n".join(todo.lines),
        seconds=time.perf_counter() - start,
        _words=wording.report(parameters, norm, norms, todo, has_group=used != alone),
    )


def _subject(given: Any, group: Any) -> tuple[dict[str, Tensor], Sequence[ProcessGroup], InCode]:
    """The parameters by name, the process groups of the call, and how code names them."""
    groups: Sequence[ProcessGroup] = meshes.as_groups(group)
    if isinstance(given, Clipper):
        if group is not None:
            raise ValueError("`group` is that of the Clipper; do not pass it together with a Clipper")
        named, code = _of_optimizers(given.optimizers, leave_out_exempt=True)
        # A Clipper has its own groups.
        return named, given._rounds.settings.groups or [], code._replace(is_clipper=True)
    if isinstance(given, nn.Module) and not isinstance(given, nn.ParameterList):
        return dict(given.named_parameters()), groups, InCode("model.parameters()", _NAMED)
    optimizers = given if isinstance(given, (list, tuple)) and given else [given]
    if all(isinstance(each, Optimizer) for each in optimizers):
        named, code = _of_optimizers(optimizers)
        return named, groups, code
    parameters = arguments.tensor_list("parameters", given)
    for i, item in enumerate(parameters):
        arguments.check_tensor("parameters", i, item)
    return _by_position(parameters), groups, InCode("parameters", _POSITIONS)


def _of_optimizers(
    optimizers: Sequence[Optimizer], *, leave_out_exempt: bool = False
) -> tuple[dict[str, Tensor], InCode]:
    """Their parameters, by name if they were made from ``named_parameters()``.

    With ``leave_out_exempt``, groups with ``max_norm=None`` are left out, unless all groups have it.
    """
    of_all = [group for optimizer in optimizers for group in optimizer.param_groups]
    clipped = [group for group in of_all if group.get("max_norm", 1.0) is not None]
    condition = ""
    if leave_out_exempt and 0 < len(clipped) < len(of_all):
        of_all, condition = clipped, ' if group.get("max_norm", 1.0) is not None'
    parameters = [p for group in of_all for p in group["params"]]
    names = [name for group in of_all for name in group.get("param_names", ())]
    of_each = "" if len(optimizers) == 1 else "for optimizer in optimizers "
    of_each += f"for group in optimizer.param_groups{condition}"
    code = f'[p {of_each} for p in group["params"]]' if condition else "parameters"
    if len(set(names)) != len(parameters):
        positions = f'((f"[{{i}}]", p) for i, p in enumerate({code}))'
        return _by_position(parameters), InCode(code, positions)
    by_name = _NAMED
    if condition:
        by_name = f'(named {of_each} for named in zip(group["param_names"], group["params"]))'
    return dict(zip(names, parameters, strict=True)), InCode(code, by_name)


def _by_position(parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """Parameters by position; a parameter that is listed twice counts once."""
    first = {id(p): i for i, p in reversed([*enumerate(parameters)])}
    return {f"[{i}]": p for i, p in enumerate(parameters) if first[id(p)] == i}
