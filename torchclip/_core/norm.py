"""The total norm of a set of gradients: how it is returned, and the error when it is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchclip import kernel
from torchclip._core import distributed, eager
from torchclip._core.batch import Facts
from torchclip._core.combine import stacked
from torchclip._core.gradients import Gradients

__all__ = ["as_result", "as_results", "in_double", "refuse_nonfinite"]

_DOUBLE = frozenset({torch.float64, torch.complex128})
_CPU = torch.device("cpu")
_SHOWN = 10


def as_result(total_norm: float | Tensor, batch: Gradients) -> Tensor:
    """The norm as a 0-dim tensor: float64 if any gradient is, else float32, where the first gradient is."""
    if isinstance(total_norm, float):
        return kernel.scalar(total_norm, in_double(batch))
    return total_norm.to(
        batch.all[0].device if batch.all else total_norm.device,
        torch.float64 if in_double(batch) else torch.float32,
    )


def as_results(norms: Sequence[float | Tensor], batch: Gradients) -> Tensor:
    """Several norms as a tensor of one dimension, as ``as_result`` returns one."""
    device = batch.all[0].device if batch.all else _CPU
    return stacked(norms, device).to(torch.float64 if in_double(batch) else torch.float32)


def in_double(batch: Gradients) -> bool:
    """Whether any gradient is float64 or complex128: then norms are float64, and else float32."""
    return bool(batch.facts & Facts.DOUBLE) or (
        len(batch.rest) > 0 and any(t.dtype in _DOUBLE for t in batch.rest)
    )


def refuse_nonfinite(
    total_norm: float | Tensor,
    norm_type: float,
    tensors: Sequence[Tensor],
    names: Mapping[int, str] | None = None,
    remedy: str = "To disable this error and scale the gradients by the non-finite norm anyway, set "
    "`error_if_nonfinite=False`",
    argument: str = "parameters",
) -> None:
    """Raise torch's error if the norm is not finite, saying which gradients are to blame.

    Args:
        total_norm: the norm; on an accelerator this waits for it.
        norm_type: its order.
        tensors: the gradients.
        names: what to call a gradient, by its ``id``; its position otherwise.
        remedy: what the user can do.
        argument: where the gradients are from.
    """
    if math.isfinite(total_norm):
        return
    found = []
    for i, (tensor, held) in enumerate(zip(tensors, distributed.locals_of(tensors), strict=True)):
        (values,) = eager.stored(held.detach(), math.inf)
        inf, nan = int(values.isinf().sum()), int(values.isnan().sum())
        if inf or nan:
            name = names[id(tensor)] if names else f"gradient {i}"
            found.append(f"{name} of shape {tuple(tensor.shape)} ({inf} inf, {nan} nan)")
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    elsewhere = "none of this rank's" if distributed.has_ranks() else "none, the norm exceeds float64"
    which = ", ".join(found[:_SHOWN]) + more if found else elsewhere
    raise RuntimeError(
        f"The total norm of order {norm_type} for gradients from `{argument}` is non-finite, so it cannot be "
        f"clipped. {remedy}. No gradient was changed. Non-finite: {which}."
    )
