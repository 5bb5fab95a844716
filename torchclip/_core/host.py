"""Tensors in host memory that the kernel does not handle, with operations of torch and NumPy."""

from __future__ import annotations

import torch
from torch import Tensor

from torchclip._core import changes, memory, norms, small
from torchclip._core.batch import Batch, Facts, Norm, Norms
from torchclip._core.joint_norms import join
from torchclip._core.rows import FLOAT32_TINY, NARROW_REAL
from torchclip._core.scalars import numbers

# Up to this many elements, sums in float64 are as fast as any; one thread computes them in any case.
_FEW = 1 << 14


class HostBatch(Batch):
    """Distinct tensors in host memory, of any dtype and layout.

    Args:
        tensors: the tensors.
        shared: whether any of them is the gradient of several parameters.
        dtype: their ``memory.common_dtype``, or None.
    """

    def __init__(self, tensors: list[Tensor], shared: bool = False, dtype: torch.dtype | None = None) -> None:
        super().__init__(tensors, shared)
        self.dtype = dtype
        if dtype is not None:
            self.rest = ()

    @property
    def facts(self) -> int:
        """``Facts`` of the tensors."""
        if self.dtype is None:
            return super().facts
        return self._shared | (Facts.DOUBLE if self.dtype is torch.float64 else 0)

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
            if 0 < sum(sizes) <= small.MOST:
                return small.norm(tensors, sizes)
        with torch.no_grad():
            return norms.norm(tensors, p)

    def scale_(self, clip_coef: Norm, /) -> None:
        """Multiply every element in place."""
        clip_coef = float(clip_coef)
        if clip_coef != 1.0:
            self._scale_(self.all, clip_coef)

    def scale_each_(self, clip_coefs: Norms, /) -> None:
        """Multiply each tensor in place by its own number."""
        chosen = [(t, c) for t, c in zip(self.all, numbers(clip_coefs), strict=True) if c != 1.0]
        if self.dtype is None or any(0 < clip_coef < FLOAT32_TINY for _, clip_coef in chosen):
            for tensor, clip_coef in chosen:
                self._scale_([tensor], clip_coef)
            return
        with changes.writing():
            for tensor, clip_coef in chosen:
                tensor.mul_(clip_coef)

    def _scale_(self, tensors: list[Tensor], clip_coef: float) -> None:
        """Multiply every tensor in place; each product is formed in at least float32, then rounded."""
        if 0 < clip_coef < FLOAT32_TINY:
            changes.scale_in_double_(tensors, clip_coef)
            return
        with changes.writing():
            together, alone = self._parted(tensors)
            changes.change_elements_(alone, lambda values: values.mul_(clip_coef))
            for dtype, group in together.items():
                if dtype in (torch.float32, torch.float64):
                    # Torch would convert a number to a tensor again for each tensor of the group.
                    torch._foreach_mul_(group, torch.scalar_tensor(clip_coef, dtype=dtype, device="cpu"))
                    continue
                # An operation on all of them would round the number to their own low precision, by up to 0.4
                # %.
                for tensor in group:
                    tensor.mul_(clip_coef)

    def clamp_(self, limit: float, /) -> None:
        """Limit every element in place to ``[-limit, limit]``."""
        together, alone = self._parted(self.all)
        with changes.writing():
            for dtype, group in together.items():
                few = [tensor for tensor in group if tensor.numel() <= memory.JOINED]
                if few:
                    within = changes.limit_within(dtype, limit)
                    torch._foreach_clamp_max_(few, within)
                    torch._foreach_clamp_min_(few, -within)
                if len(few) < len(group):
                    alone += [tensor for tensor in group if tensor.numel() > memory.JOINED]
        changes.clamp_elements_(alone, limit)

    def zero_nonfinite_(self) -> None:
        """Set every infinite or NaN element to 0."""
        changes.zero_nonfinite_(self.all)

    def _parted(self, tensors: list[Tensor]) -> tuple[dict[torch.dtype, list[Tensor]], list[Tensor]]:
        """The tensors that can be changed together, as real numbers, by dtype; and the others."""
        if self.dtype is not None:
            return {self.dtype: tensors}, []
        together: dict[torch.dtype, list[Tensor]] = {}
        alone = []
        for tensor in tensors:
            if memory.is_plain(tensor):
                real = memory.as_real(tensor)
                together.setdefault(real.dtype, []).append(real)
            else:
                alone.append(tensor)
        return together, alone
