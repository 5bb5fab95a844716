"""Sharded gradients during a backward pass: clipped without other ranks, which join the norms at its end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchclip._core import gather, mesh, scalars
from torchclip._core.batch import Norm
from torchclip.clipper.rules import ratio
from torchclip.clipper.step import parameters_of
from torchclip.thresholds.base import Rule


class HeldNorms:
    """The norms of what this rank holds of gradients, before and after clipping.

    Args:
        order: of the norms, above 0.
    """

    def __init__(self, order: float) -> None:
        self._order = order
        self._before: list[Tensor] = []
        self._after: list[Tensor] = []

    def clip(self, optimizer: Optimizer, way: Rule | None) -> None:
        """Clip the gradients of an optimizer by a rule that takes no norm; None only measures them."""
        groups = optimizer.param_groups
        grads = gather.distinct_gradients(parameters_of(optimizer))
        if any(map(mesh.is_partial, grads)):
            raise RuntimeError(
                "the gradients of a step that is taken during the backward pass are pending a reduction over "
                "ranks. Call optimizer.step() after backward()"
            )
        self._before += self._norms_of(grads)
        if way is not None:
            way.clip_([p for group in groups if "max_norm" not in group for p in group["params"]])
        self._after += self._norms_of(grads)

    def join(self) -> tuple[Norm, Norm]:
        """The norm of all gradients on all ranks, and what it was multiplied by."""
        before, after = (
            gather.tensors(norms).norm(self._order) if norms else 0.0 for norms in (self._before, self._after)
        )
        return before, ratio(after, before)

    def _norms_of(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """A tensor for each gradient, which lies as it does and has one element on each rank, the norm."""
        found = []
        for grad, part in zip(grads, mesh.locals_of(grads), strict=True):
            norm = scalars.present(gather.tensors([part]).norm(self._order))
            held = torch.as_tensor(norm, dtype=torch.float64, device=part.device).reshape(1)
            if mesh.is_dtensor(grad):
                from torch.distributed.tensor import DTensor, Replicate, Shard

                places = [Replicate() if each.is_replicate() else Shard(0) for each in grad.placements]
                held = DTensor.from_local(held, grad.device_mesh, places, run_check=False)
            found.append(held)
        return found
