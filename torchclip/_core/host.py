"""Tensors in host memory that the kernel does not handle, with operations of torch and NumPy."""

from __future__ import annotations

import torch
from torch import Tensor

from torchclip._core import narrow, norms
from torchclip._core.batch import Facts, Norm, Norms
from torchclip._core.changes import TorchBatch
from torchclip._core.joint_norms import join
from torchclip._core.narrow import NARROW_REAL
from torchclip._core.scalars import numbers

# Up to this many elements, sums in float64 are as fast as any; one thread computes them in any case.
_FEW = 1 << 14


class HostBatch(TorchBatch):
    """Distinct tensors in host memory: a ``TorchBatch`` whose values are read."""

    @property
    def facts(self) -> int:
        """``Facts`` of the tensors."""
        if self.dtype is None:
            return super().facts
        return self._tied | (Facts.DOUBLE if self.dtype is torch.float64 else 0)

    def norm(self, p: float, finite: bool = False, /) -> Norm:
        """The norm of all elements, or of the finite ones, as one vector."""
        if finite:
            return join(self.norms(p, True), p)
        return self._norm(self.all, p)

    def norms(self, p: float, finite: bool = False, /) -> Norms:
        """The norm of each tensor."""
        if finite:
            with torch.no_grad():
                return [norms.finite_norm(tensor, p) for tensor in self.all]
        if p in (1, 2) and self.dtype in NARROW_REAL:
            few = [tensor for tensor in self.all if 0 < tensor.numel() <= _FEW]
            with torch.no_grad():
                found = torch._foreach_norm(few, p, dtype=torch.float64) if few else ()
                of_few = iter(torch.stack(found).tolist() if found else ())
            sizes = [tensor.numel() for tensor in self.all]
            return [
                next(of_few) if 0 < size <= _FEW else self._norm([tensor], p)
                for tensor, size in zip(self.all, sizes, strict=True)
            ]
        return [self._norm([tensor], p) for tensor in self.all]

    def _norm(self, tensors: list[Tensor], p: float) -> float:
        if p == 2 and self.dtype in NARROW_REAL:
            sizes = [tensor.numel() for tensor in tensors]
            if 0 < sum(sizes) <= narrow.FEW:
                return narrow.norm_of_few(tensors, sizes)
        with torch.no_grad():
            return norms.norm(tensors, p)

    def scale_(self, clip_coef: Norm, /) -> None:
        """Multiply every element in place; waits for a number that is on a device."""
        super().scale_(float(clip_coef))

    def scale_each_(self, clip_coefs: Norms, /) -> None:
        """Multiply each tensor in place by its own number, likewise."""
        super().scale_each_(numbers(clip_coefs))
