"""Torch operations that never wait for a value: for tensors on other devices, and for all while tracing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchclip._core import changes, memory
from torchclip._core.batch import Norm, Norms
from torchclip._core.host import facts_of
from torchclip._core.rows import NARROW, matrix_norms
from torchclip._core.scalars import ABSENT, join, join_rows, on_device

__all__ = ["AcceleratorBatch"]


class AcceleratorBatch:
    """Distinct tensors whose values nobody looks at; a ``Batch``.

    Args:
        tensors: the tensors.
        shared: whether any of them is the gradient of several parameters.
    """

    def __init__(self, tensors: list[Tensor], shared: bool = False) -> None:
        self.all = tensors
        self._shared = shared

    @property
    def facts(self) -> int:
        """``Facts`` of the tensors."""
        return facts_of(self.all, self._shared)

    def norm(self, p: float, finite: bool = False, /) -> Norm:
        """The norm of all elements, or of the finite ones, as one vector."""
        norms = self.norms(p, finite)
        return join(norms, p) if len(norms) else ABSENT

    def norms(self, p: float, finite: bool = False, /) -> Norms:
        """The norm of each tensor."""
        if not self.all:
            return []
        with torch.no_grad():
            each: list[Norm] = [_norm(tensor, p, finite) for tensor in self.all]
            return on_device(each, self.all[0].device)

    def scale_(self, clip_coef: Norm, /) -> None:
        """Multiply every element in place."""
        with torch.no_grad():
            together, alone = changes.parted(self.all)
            for tensor in alone:
                changes.scale_alone_(tensor, clip_coef)
            for (dtype, device), group in together.items():
                number = _on(clip_coef, device)
                if dtype in (torch.float32, torch.float64):
                    torch._foreach_mul_(group, number.to(dtype))
                    continue
                for tensor in group:
                    tensor.copy_(tensor.float() * number.float())

    def scale_each_(self, clip_coefs: Norms, /) -> None:
        """Multiply each tensor in place by its own number."""
        for tensor, clip_coef in zip(self.all, clip_coefs, strict=True):
            AcceleratorBatch([tensor]).scale_(clip_coef)

    def clamp_(self, limit: float, /) -> None:
        """Limit every element in place to ``[-limit, limit]``."""
        changes.clamp_elements_(self.all, limit)

    def zero_nonfinite_(self) -> None:
        """Put 0 in the place of every infinite or NaN element."""
        changes.zero_nonfinite_(self.all)


def _on(clip_coef: Norm, device: torch.device) -> Tensor:
    if isinstance(clip_coef, Tensor):
        return clip_coef.to(device)
    return torch.full((), clip_coef, dtype=torch.float64, device=device)


def _norm(tensor: Tensor, p: float, finite: bool) -> Norm:
    parts: list[Tensor] = []
    found: list[Tensor] = []
    for values in memory.stored(tensor.detach(), p):
        if not values.numel():
            continue
        if finite:
            usable = values.isfinite()
            found.append(usable.any())
            values = torch.where(usable, values, 0)
        parts += _parts(values, p)
    if not parts:
        return ABSENT
    norm = join_rows(torch.cat(parts), p)
    return torch.where(torch.stack(found).any(), norm, ABSENT) if finite else norm


def _parts(values: Tensor, p: float) -> Sequence[Tensor]:
    whole = values.dtype in NARROW or memory.intercepted()
    pieces = [values.reshape(1, -1)] if whole else [n.view(1, -1) for n in memory.pieces(values)]
    return [matrix_norms(piece, p) for piece in pieces]
