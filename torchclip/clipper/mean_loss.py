"""The loss by which all ranks decide alike whether a step is skipped: the mean of theirs."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from torchclip._core import scalars
from torchclip._core.batch import Norm
from torchclip._core.ranks import meshes
from torchclip._core.ranks.exchange import Call, Kind, connected, exchange
from torchclip.clipper.names import Names
from torchclip.clipper.optimizers import parameters_of
from torchclip.clipper.step import is_fused

_MISSING = (
    "`skip_loss_above` judges the loss of each step, but this step has none; assign it before the step: "
    "`clipper.loss = loss`"
)


def mean_loss(
    loss: float | Tensor | None,
    optimizers: Sequence[Optimizer],
    groups: Sequence[dist.ProcessGroup] | None,
    names: Names,
) -> Norm:
    """The loss that decides: the mean of the losses of all ranks that train together.

    All of them must call this.  One all-reduce of a few kilobytes sums the losses exactly, so that every rank
    has the same bits.  Losses below 0 do not count.  On an accelerator this waits for the loss, unless all
    steps are fused, as only these can skip themselves.

    Args:
        loss: this rank's loss.
        optimizers: the optimizers.
        groups: the process groups whose other ranks have further gradients.
        names: those of the parameters, which know the process groups of replicas.

    Raises:
        RuntimeError: if there is no loss; other ranks are told.
    """
    found = groups_deciding(optimizers, groups, names)
    if not found:
        if loss is None:
            raise RuntimeError(_MISSING)
        return _readable(loss, optimizers)
    return _readable(_mean_of_ranks(loss, found), optimizers)


def _mean_of_ranks(loss: float | Tensor | None, groups: Sequence[dist.ProcessGroup]) -> Norm:
    call = Call(Kind.MEAN_LOSS, 1.0)
    connected(groups, call)
    if loss is None:
        call.fail(_MISSING)
    norms = scalars.in_one([scalars.ABSENT if loss is None else _as_norm(loss)])
    counts = [float(not norms[0] < 0)] if isinstance(norms, list) else (~(norms < 0)).to(norms.dtype)
    device = meshes.device_of(groups[0], norms.device.type if isinstance(norms, Tensor) else None)
    total, count = exchange(groups, scalars.concatenate([norms, counts]), call, device)
    if call.error is not None:
        raise RuntimeError(call.error)
    nobody = count == 0.0
    mean: Norm = scalars.where(nobody, total, total / scalars.where(nobody, total, count))
    return mean


def groups_deciding(
    optimizers: Sequence[Optimizer], groups: Sequence[dist.ProcessGroup] | None, names: Names
) -> list[dist.ProcessGroup]:
    """Process groups that together connect all ranks which take the same decision; none without ranks.

    Raises:
        ValueError: if there are other ranks, and nothing says which of them these are.
    """
    if not meshes.has_ranks() or dist.get_world_size() == 1:
        return []
    parameters = parameters_of(*optimizers)
    of_meshes = {id(p.device_mesh): p.device_mesh for p in parameters if meshes.is_dtensor(p)}
    found = [*(groups or ()), *names.replicas]
    found += [group for mesh in of_meshes.values() for group in meshes.groups_over(mesh)]
    if not found:
        raise ValueError(
            "`skip_loss_above` decides by the mean loss of the ranks that train together, and nothing shows "
            "which ranks these are: pass the DistributedDataParallel model as `model`, or shard the model "
            "(fully_shard) before its optimizer is made, or pass the `group` whose ranks have further "
            "gradients"
        )
    # Of ranks that others include, the sum is in theirs.
    ranks = {meshes.ranks_of(group): group for group in found}
    return [
        group
        for some, group in ranks.items()
        if not any(meshes.are_within(some, others) for others in ranks if others != some)
    ]


def _as_norm(loss: float | Tensor) -> Norm:
    return loss.to(scalars.norm_dtype(loss.device)) if isinstance(loss, Tensor) else loss


def _readable(loss: float | Tensor, optimizers: Sequence[Optimizer]) -> Norm:
    """The loss as a number, unless all steps can skip themselves by a value on their device."""
    if not isinstance(loss, Tensor):
        return loss
    devices = {p.device for p in parameters_of(*optimizers)}
    return _as_norm(loss) if devices == {loss.device} and all(map(is_fused, optimizers)) else float(loss)
