"""The engine for all tensors that the kernel does not take: operations of torch.

It takes tensors in host memory and on other devices, sparse ones, subclasses, and tensors whose operations
are traced.  If all values are in host memory and may be read, norms are floats.  Otherwise nothing waits for
a value: norms are tensors, and the number of operations does not depend on the number of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from torchclip._core import memory
from torchclip._core.batch import Batch, Norm, Norms
from torchclip._core.groups import REAL, Group, grouped, joint, moved
from torchclip._core.joint_norms import join
from torchclip._core.rows import norm_on_host, wide_dtype
from torchclip._core.scalars import ABSENT, at, numbers


class TorchBatch(Batch):
    """Distinct tensors of any dtype and layout; those of one device and dtype are changed together.

    Args:
        tensors: the tensors.
        shared: whether any of them is the gradient of several parameters.
        dtype: their ``memory.common_dtype``, or None.
    """

    _parted: tuple[list[Group], list[tuple[int, Tensor]]] | None = None

    def __init__(self, tensors: list[Tensor], shared: bool = False, dtype: torch.dtype | None = None) -> None:
        super().__init__(tensors, shared)
        self._dtype = dtype
        self._on_host = dtype is not None or memory.on_host(tensors)
        if dtype is not None:
            self.rest = ()

    def norm(self, p: float, /) -> Norm:
        """The norm of all elements as one vector."""
        with torch.no_grad():
            groups = self._measured(p)
            if self._on_host:
                return join([norm_on_host(group.tensors, p) for group in groups], p)
            if not groups:
                return ABSENT
            in_range = all(group.in_range(p) for group in groups)
            return joint(_together([group.norms(p) for group in groups]), p, in_range)

    def norms(self, p: float, /) -> Norms:
        """The norm of each tensor."""
        with torch.no_grad():
            groups = self._measured(p)
            if not groups:
                return [ABSENT] * len(self.all)
            positions: list[int | None] = [None] * len(self.all)
            for position, place in enumerate(place for group in groups for place in group.places):
                positions[place] = position
            norms = at(_together([group.norms(p) for group in groups]), positions)
            return numbers(norms) if self._on_host else norms

    def _measured(self, p: float) -> list[Group]:
        """Strided tensors that have the norms of the batch's own."""
        groups, others = self._in_groups()
        if not others:
            return groups
        values = [(place, _values(tensor, p, self._on_host)) for place, tensor in others]
        return groups + grouped((place, tensor) for place, tensor in values if tensor.numel())

    def _in_groups(self) -> tuple[list[Group], list[tuple[int, Tensor]]]:
        """Plain real tensors in groups, and the other tensors with their positions."""
        if self._dtype is not None:
            places = [place for place, tensor in enumerate(self.all) if tensor.numel()]
            return [Group(True, [self.all[place] for place in places], places)] if places else [], []
        if self._parted is None:
            real: list[tuple[int, Tensor]] = []
            others: list[tuple[int, Tensor]] = []
            for place, tensor in enumerate(self.all):
                if tensor.dtype not in REAL or not memory.is_plain(tensor):
                    others.append((place, tensor))
                elif tensor.numel():
                    real.append((place, tensor))
            self._parted = grouped(real, are_plain=True), others
        return self._parted

    def scale_(self, clip_coef: Norm, /) -> None:
        """Multiply every element in place; a tensor is not read, unless all memory is the host's."""
        if self._on_host:
            clip_coef = float(clip_coef)
        if isinstance(clip_coef, float):
            if clip_coef != 1.0:
                self._change_(lambda group: group.scale_(clip_coef))
            return
        there = _on_each_device(clip_coef)
        self._change_(lambda group: group.scale_(there(group)))

    def scale_each_(self, clip_coefs: Norms, /) -> None:
        """Multiply each tensor in place by its own number."""
        if self._on_host:
            clip_coefs = numbers(clip_coefs)
        if isinstance(clip_coefs, list):
            unchanged = {place for place, clip_coef in enumerate(clip_coefs) if clip_coef == 1.0}
            if len(unchanged) < len(clip_coefs):
                self._change_(lambda group: group.scale_each_(clip_coefs), unchanged=unchanged)
            return
        there = _on_each_device(clip_coefs)
        self._change_(lambda group: group.scale_each_(there(group)))

    def clamp_(self, limit: float, /) -> None:
        """Limit every element in place to ``[-limit, limit]``."""
        self._change_(lambda group: group.clamp_(limit))

    def zero_nonfinite_(self) -> None:
        """Set every infinite or NaN element to 0."""
        self._change_(Group.zero_nonfinite_, as_real=False)

    def _change_(
        self, change_: Callable[[Group], None], as_real: bool = True, unchanged: Collection[int] = ()
    ) -> None:
        """Change the memory of all elements, group by group.

        Args:
            change_: changes a group.
            as_real: whether complex numbers are changed as pairs of real ones.
            unchanged: the positions of tensors that ``change_`` does not change.
        """
        groups, others = self._in_groups()
        with writing():
            for group in groups:
                change_(group)
            if others:
                _change_others_([each for each in others if each[0] not in unchanged], change_, as_real)


def writing() -> AbstractContextManager[None]:
    """The context for changes: no graph is built, and tensors that were made in inference mode may be
    changed.

    The version counters of other tensors go up, as elsewhere.
    """
    return torch.no_grad() if memory.intercepted() else torch.inference_mode()


def own_elements(tensor: Tensor) -> Tensor:
    """The memory of a tensor's elements; a sparse one stores each of them once from now on."""
    if memory.is_uncoalesced(tensor):
        # The stored values are new, and must have been made in the same mode as the tensor.
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(tensor.coalesce())
    return memory.own_values(tensor)


def _change_others_(
    others: Sequence[tuple[int, Tensor]], change_: Callable[[Group], None], as_real: bool
) -> None:
    found: list[tuple[int, Tensor]] = []
    for place, tensor in others:
        if tensor.is_mkldnn:  # one at a time, as its elements can be changed in a copy only
            values = tensor.to_dense()
            change_(Group(False, [values], [place]))
            tensor.copy_(values.to_mkldnn())
            continue
        values = own_elements(tensor)
        found.append((place, memory.as_real(values) if as_real and memory.is_plain(values) else values))
    for group in grouped(found):
        change_(group)


def _values(tensor: Tensor, p: float, on_host: bool) -> Tensor:
    """Strided numbers that have the norm of a tensor of any layout and dtype.

    In host memory they are the tensor's own; elsewhere, real ones that torch's operations on lists
    can measure.
    """
    # Complex numbers need a view, and a sparse tensor's values have one only when they are detached.
    parts = [part.detach() for part in memory.stored(tensor, p)]
    values = parts[0] if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])
    if values.is_complex() and p == 2 and not memory.values_hidden():
        values = torch.view_as_real(values.resolve_conj())
    if on_host:
        return values
    if values.is_complex():
        values = values.to(wide_dtype(values)).abs()
    elif values.dtype not in REAL:
        values = values.to(wide_dtype(values))
    return values if memory.values_hidden() else values.resolve_neg()


def _together(norms: Sequence[Tensor]) -> Tensor:
    """All norms on the device of the first ones."""
    return norms[0] if len(norms) == 1 else torch.cat([moved(each, norms[0].device) for each in norms])


def _on_each_device(clip_coefs: Tensor) -> Callable[[Group], Tensor]:
    """A function that gives a group the number or numbers on its device, in the dtype to multiply in."""
    made: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def there(group: Group) -> Tensor:
        device, dtype = group.device, group.coef_dtype()
        if (device, dtype) not in made:
            made[device, dtype] = moved(clip_coefs.to(dtype), device)
        return made[device, dtype]

    return there
