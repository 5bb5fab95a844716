"""Changes in place with torch operations, tensor by tensor: what host and accelerator have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from torchclip._core import memory


def writing() -> AbstractContextManager[None]:
    """The context for changes: no graph is built, and tensors that were made in inference mode may be
    changed.

    The version counters of other tensors go up, as elsewhere.
    """
    return torch.no_grad() if memory.intercepted() else torch.inference_mode()


def own_elements(tensor: Tensor) -> Tensor:
    """The memory of the elements that a sparse tensor stores; each is stored once from now on."""
    if memory.is_uncoalesced(tensor):
        # The stored values are new, and must have been made in the same mode as the tensor.
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(tensor.coalesce())
    return memory.own_values(tensor)


def scale_in_double_(tensors: Sequence[Tensor], clip_coef: float) -> None:
    """Multiply tensors of any layout in place by a number that has more digits than float32."""

    def scale_(values: Tensor) -> Tensor:
        for part in memory.by_rows(memory.as_real(values)):
            part.copy_(part.double().mul_(clip_coef))
        return values

    change_elements_(tensors, scale_)


def clamp_elements_(tensors: Sequence[Tensor], limit: float) -> None:
    """Limit every element in place to ``[-limit, limit]``; NaN stays NaN."""

    def clamp_(values: Tensor) -> Tensor:
        within = limit_within(values.dtype, limit)
        return values.clamp_(-within, within)

    change_elements_(tensors, clamp_)


def limit_within(dtype: torch.dtype, limit: float) -> float:
    """A limit that torch accepts for a dtype: it refuses one beyond the range, which limits nothing."""
    return limit if limit <= torch.finfo(dtype).max else math.inf


def zero_nonfinite_(tensors: Sequence[Tensor]) -> None:
    """Set every element to 0 that is infinite or NaN."""
    change_elements_(tensors, lambda values: values.masked_fill_(~values.isfinite(), 0))


def change_elements_(tensors: Sequence[Tensor], change_: Callable[[Tensor], Tensor]) -> None:
    """Change the elements of tensors of any layout in place, one by one."""
    if not tensors:  # often, and the context alone would take as long as a small tensor
        return
    with writing():
        for tensor in tensors:
            if tensor.is_mkldnn:
                tensor.copy_(change_(tensor.to_dense()).to_mkldnn())
                continue
            if tensor.layout not in memory.SPARSE:
                change_(tensor)
                continue
            change_(own_elements(tensor))
            torch.autograd.graph.increment_version(tensor)
