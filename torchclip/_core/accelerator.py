"""Torch operations that never wait for a value: for tensors on other devices, and while operations are
traced.

The number of operations does not depend on the number of tensors: all those of one device and dtype are
handed to torch's ``_foreach_`` operations together.  Norms and clip coefficients stay on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchclip._core import memory
from torchclip._core.batch import Norm, Norms
from torchclip._core.changes import TorchBatch
from torchclip._core.groups import REAL, Group, grouped, joint, moved
from torchclip._core.joint_norms import join
from torchclip._core.rows import wide_dtype
from torchclip._core.scalars import ABSENT


class AcceleratorBatch(TorchBatch):
    """Distinct tensors on any devices: a ``TorchBatch`` whose values are not read."""

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

    def _measured(self, p: float, finite: bool) -> list[Group]:
        """Real strided tensors that have the norms of the batch's own."""
        groups, others = self.parted()
        if not others:
            return groups
        values = [(place, _magnitudes(tensor, p, finite)) for place, tensor in others]
        return groups + grouped((place, tensor) for place, tensor in values if tensor.numel())


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
