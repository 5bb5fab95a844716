"""Torch operations that never wait for a value: for tensors on other devices, and while operations are
traced.

The number of operations does not depend on the number of tensors: all those of one device and dtype are
handed to torch's ``_foreach_`` operations together.  Norms and clip coefficients stay on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torchclip._core import changes, memory
from torchclip._core.batch import Batch, Norm, Norms
from torchclip._core.groups import REAL, Group, grouped, joint, moved
from torchclip._core.joint_norms import join
from torchclip._core.rows import FLOAT32_TINY, PRESCALE, wide_dtype
from torchclip._core.scalars import ABSENT


class AcceleratorBatch(Batch):
    """Distinct tensors on any devices, of any dtypes and layouts.

    Args:
        tensors: the tensors.
        shared: whether any of them is the gradient of several parameters.
    """

    def __init__(self, tensors: list[Tensor], shared: bool = False) -> None:
        super().__init__(tensors, shared)
        self._groups, self._others = _parted(tensors)

    def norm(self, p: float, finite: bool = False, /) -> Norm:
        """The norm of all elements, or of the finite ones, as one vector."""
        if finite:
            return join(self.norms(p, True), p)
        with torch.no_grad():
            groups = self._measured(p, finite)
            if not groups:
                return ABSENT
            device = groups[0].device
            by_device: dict[torch.device, list[Tensor]] = {}
            for group in groups:
                by_device.setdefault(group.device, []).extend(group.norms_of_parts(p))
            in_range = all(group.in_range(p) for group in groups)
            of_devices = [moved(joint(norms, p, in_range), device) for norms in by_device.values()]
            return joint(of_devices, p, in_range)

    def norms(self, p: float, finite: bool = False, /) -> Norms:
        """The norm of each tensor."""
        with torch.no_grad():
            groups = self._measured(p, finite)
            if not groups:
                return [ABSENT] * len(self.all)
            device = groups[0].device
            vectors = [
                moved(g.finite_norms(p) if finite else torch.stack(g.norms(p)), device) for g in groups
            ]
            if len(vectors) == 1 and len(vectors[0]) == len(self.all):
                return vectors[0]
            in_order = [vectors[0].new_full((), ABSENT)] * len(self.all)
            for group, vector in zip(groups, vectors, strict=True):
                for place, norm in zip(group.places, vector.unbind(), strict=True):
                    in_order[place] = norm
            return torch.stack(in_order)

    def scale_(self, clip_coef: Norm, /) -> None:
        """Multiply every element in place; always by a tensor, without waiting to see whether it is 1."""
        if isinstance(clip_coef, float):
            if clip_coef == 1.0:
                return
            if 0 < clip_coef < FLOAT32_TINY:
                self.scale_(PRESCALE)
                return self.scale_(clip_coef / PRESCALE)
        with changes.writing():
            for group, clip_coef_there in self._with(clip_coef):
                group.scale_(clip_coef_there)
            self._tell_sparse()

    def scale_each_(self, clip_coefs: Norms, /) -> None:
        """Multiply each tensor in place by its own number."""
        if isinstance(clip_coefs, list):
            for tensor, clip_coef in zip(self.all, clip_coefs, strict=True):
                AcceleratorBatch([tensor]).scale_(clip_coef)
            return
        with changes.writing():
            for group, clip_coefs_there in self._with(clip_coefs):
                group.scale_each_(clip_coefs_there)
            self._tell_sparse()

    def clamp_(self, limit: float, /) -> None:
        """Limit every element in place to ``[-limit, limit]``."""
        alone = [tensor for _, tensor in self._others]
        with changes.writing():
            for group in self._groups:
                if group.foreach:
                    within = changes.limit_within(group.dtype, limit)
                    torch._foreach_clamp_max_(group.tensors, within)
                    torch._foreach_clamp_min_(group.tensors, -within)
                else:
                    alone += group.tensors
        changes.clamp_elements_(alone, limit)

    def zero_nonfinite_(self) -> None:
        """Set every infinite or NaN element to 0."""
        with changes.writing():
            for group in self._groups:
                group.zero_nonfinite_()
        changes.zero_nonfinite_([tensor for _, tensor in self._others])

    def _measured(self, p: float, finite: bool) -> list[Group]:
        """Real strided tensors that have the norms of the batch's own."""
        if not self._others:
            return self._groups
        values = [(place, _magnitudes(tensor, p, finite)) for place, tensor in self._others]
        return self._groups + grouped((place, tensor) for place, tensor in values if tensor.numel())

    def _with(self, clip_coefs: Norm) -> Iterator[tuple[Group, Tensor]]:
        """The memory of all elements in groups, each with the number or numbers on its device."""
        groups = self._groups
        if self._others:
            groups = groups + grouped((place, _own_elements(tensor)) for place, tensor in self._others)
        made: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        for group in groups:
            device, dtype = group.device, group.coef_dtype()
            if (device, dtype) not in made:
                made[device, dtype] = _on(clip_coefs, device, dtype)
            yield group, made[device, dtype]

    def _tell_sparse(self) -> None:
        """Tell sparse tensors that their values were changed."""
        for _, tensor in self._others:
            if tensor.layout in memory.SPARSE:
                torch.autograd.graph.increment_version(tensor)


def _parted(tensors: Sequence[Tensor]) -> tuple[list[Group], list[tuple[int, Tensor]]]:
    """Plain real tensors in groups, without empty ones; and the other tensors with their positions."""
    real: list[tuple[int, Tensor]] = []
    others: list[tuple[int, Tensor]] = []
    for place, tensor in enumerate(tensors):
        if tensor.dtype not in REAL or not memory.is_plain(tensor):
            others.append((place, tensor))
        elif tensor.numel():
            real.append((place, tensor))
    return grouped(real), others


def _magnitudes(tensor: Tensor, p: float, finite: bool) -> Tensor:
    """Real numbers that have the norm of a tensor of any layout and dtype."""
    # Complex numbers need a view, and a sparse tensor's values have one only when they are detached.
    parts = [part.detach() for part in memory.stored(tensor, p)]
    values = parts[0] if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])
    if values.is_complex():
        if p == 2 and not finite and not memory.values_hidden():
            values = torch.view_as_real(values.resolve_conj())
        else:
            values = values.to(wide_dtype(values)).abs()
    elif values.dtype not in REAL:
        values = values.to(wide_dtype(values))
    return values if memory.values_hidden() else values.resolve_neg()


def _own_elements(tensor: Tensor) -> Tensor:
    """A tensor's own memory, as real numbers if possible."""
    values = changes.own_elements(tensor) if tensor.layout in memory.SPARSE else tensor
    return memory.as_real(values) if memory.is_plain(values) else values


def _on(clip_coefs: Norm, device: torch.device, dtype: torch.dtype) -> Tensor:
    if isinstance(clip_coefs, float):
        # The device writes it: a copy from the host would make the device wait.
        return torch.full((), clip_coefs, dtype=dtype, device=device)
    return moved(clip_coefs.to(dtype), device)
