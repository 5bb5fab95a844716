"""Tensors of one device and dtype, as torch's ``_foreach_`` operations take them: norms and changes in place.

Nothing here waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from torchclip._core import memory
from torchclip._core.joint_norms import divisor_like, join_present, vector_norms
from torchclip._core.rows import FLOAT32_TINY, NARROW_REAL, SERIAL, norm_on_host, powers_fit, wide_dtype
from torchclip._core.scalars import Norm, Norms, norm_dtype, vector

# If a norm needs copies, the number of elements copied at a time: never a second set of all gradients.
_COPIED = 1 << 24
# Devices known to multiply float16 tensors together by a float32 number, in float32.
_UNSCALING = frozenset({"cuda"})
REAL = NARROW_REAL | {torch.float64}


class Group:
    """Non-empty tensors of one device and dtype, with their positions among all tensors of a batch.

    Args:
        foreach: whether torch's operations on lists accept them: a subclass, and the transforms of
            ``torch.func``, may know only operations on single tensors.
        tensors: the tensors; if they are measured, real ones.
        places: their positions in the batch.
    """

    def __init__(self, foreach: bool, tensors: list[Tensor], places: Sequence[int]) -> None:
        self.foreach = foreach
        self.tensors = tensors
        self.places = places
        self.device, self.dtype = tensors[0].device, tensors[0].dtype
        self.on_host = memory.on_host(tensors[:1])

    # Norms

    def in_range(self, p: float) -> bool:
        """Whether all powers stay in the range of the dtype in which norms are accumulated."""
        return powers_fit(self.dtype, self.device, p)

    def norms(self, p: float) -> Tensor:
        """The norm of each tensor, accumulated in the widest dtype that the device has."""
        if self.on_host:
            return self._norms_on_host(p)
        if self.in_range(p):
            return torch.stack(self._plain_norms(p))
        divisors = divisor_like(torch.stack(self._plain_norms(math.copysign(math.inf, p))))
        with_axis = torch.split(divisors, 1)
        quotients: list[Tensor] = []
        for chunk in self._chunks():
            # The chunks are in order.
            of_chunk = with_axis[len(quotients) : len(quotients) + len(chunk.tensors)]
            quotients += chunk._divided_each(of_chunk)._plain_norms(p)
        return torch.stack(quotients) * divisors

    def _norms_on_host(self, p: float) -> Tensor:
        """The norm of each tensor: of small ones in one call, of others piece by piece."""
        most = SERIAL if self.foreach and self.in_range(p) else 0
        small = [tensor for tensor in self.tensors if 0 < tensor.numel() <= most]
        of_small = iter(torch.stack(self._like(small)._plain_norms(p)).tolist() if small else ())
        return vector(
            [
                next(of_small) if 0 < tensor.numel() <= most else norm_on_host([tensor], p)
                for tensor in self.tensors
            ]
        )

    def _plain_norms(self, p: float) -> list[Tensor]:
        dtype = norm_dtype(self.device)
        if self.foreach:
            return list(torch._foreach_norm(self.tensors, p, dtype=dtype))
        return [vector_norm(tensor, p, dtype=dtype) for tensor in self.tensors]

    def _like(self, tensors: Iterable[Tensor]) -> Group:
        return Group(self.foreach, list(tensors), self.places)

    def _chunks(self) -> Iterator[Group]:
        """The group in parts of at most ``_COPIED`` elements, or of one tensor."""
        start, size = 0, 0
        for i, tensor in enumerate(self.tensors):
            if i > start and size + tensor.numel() > _COPIED:
                yield self._like(self.tensors[start:i])
                start, size = i, 0
            size += tensor.numel()
        yield self._like(self.tensors[start:])

    def _divided_each(self, divisors: Sequence[Tensor]) -> Group:
        """Each tensor divided by its own number, in the dtype of the numbers, which have one axis."""
        if self.foreach:
            return self._like(torch._foreach_div(self.tensors, list(divisors)))
        return self._like(tensor / divisor for tensor, divisor in zip(self.tensors, divisors, strict=True))

    # Changes in place

    def coef_dtype(self) -> torch.dtype:
        """The dtype to multiply in: float32 at least."""
        return torch.float64 if self.dtype in memory.DOUBLE else torch.float32

    def scale_(self, clip_coef: Norm) -> None:
        """Multiply all tensors by a number, or a tensor of ``coef_dtype``; each product is rounded once."""
        if isinstance(clip_coef, float):
            is_tiny = 0 < clip_coef < FLOAT32_TINY and self.dtype not in memory.DOUBLE
            if self.on_host and (is_tiny or not self.foreach):
                for tensor in self.tensors:
                    _multiply_(tensor, clip_coef)
                return
            dtype = norm_dtype(self.device) if is_tiny else self.coef_dtype()
            # The device writes it: a copy from the host would make the device wait.
            clip_coef = self.tensors[0].new_full((), clip_coef, dtype=dtype)
        # In host memory torch forms products with a float32 tensor in float32, for all dtypes.
        if self.foreach and (self.on_host or self.dtype == clip_coef.dtype):
            torch._foreach_mul_(self.tensors, clip_coef)
        elif self.foreach and self.dtype is torch.float16 and self.device.type in _UNSCALING:
            # It multiplies by its argument "inverse"; the non-finite values that it finds do not matter here.
            found_inf = torch.zeros((), dtype=torch.float32, device=self.device)
            torch._amp_foreach_non_finite_check_and_unscale_(self.tensors, found_inf, clip_coef)
            torch.autograd.graph.increment_version(self.tensors)
        else:
            count = len(self.tensors)
            self._scale_each_([clip_coef] * count, [clip_coef.view(1)] * count)

    def scale_each_(self, clip_coefs: Norms) -> None:
        """Multiply each tensor by the number at its place; each product is rounded once."""
        if isinstance(clip_coefs, list):
            for tensor, place in zip(self.tensors, self.places, strict=True):
                if clip_coefs[place] != 1.0:
                    _multiply_(tensor, clip_coefs[place])
            return
        numbers, with_axis = clip_coefs.unbind(), torch.split(clip_coefs, 1)
        self._scale_each_([numbers[i] for i in self.places], [with_axis[i] for i in self.places])

    def clamp_(self, limit: float) -> None:
        """Limit every element to ``[-limit, limit]``; NaN stays NaN."""
        # Torch refuses a limit beyond the range of the dtype, which limits nothing.
        limit = limit if limit <= torch.finfo(self.dtype).max else math.inf
        if self.foreach:
            torch._foreach_clamp_max_(self.tensors, limit)
            torch._foreach_clamp_min_(self.tensors, -limit)
            return
        for tensor in self.tensors:
            tensor.clamp_(-limit, limit)

    def zero_nonfinite_(self) -> None:
        """Set every infinite or NaN element to 0; no operation on lists does so in place."""
        for chunk in self._chunks():
            tensors = chunk.tensors
            if len(tensors) == 1 or self.on_host:
                for tensor in tensors:
                    _zero_nonfinite_(tensor)
                continue
            sizes = [tensor.numel() for tensor in tensors]
            whole = torch.empty(sum(sizes), dtype=self.dtype, device=self.device)
            parts = zip(torch.split(whole, sizes), tensors, strict=True)
            copies = [part.view(tensor.shape) for part, tensor in parts]
            torch._foreach_copy_(copies, tensors)
            _zero_nonfinite_(whole)
            torch._foreach_copy_(tensors, copies)

    def _scale_each_(self, numbers: list[Tensor], with_axis: list[Tensor]) -> None:
        if self.dtype == numbers[0].dtype or self.dtype.is_complex:
            chosen = numbers
        else:
            # Beside tensors with axes a number's dtype counts only if it has an axis too.
            choices = zip(self.tensors, numbers, with_axis, strict=True)
            chosen = [vector if tensor.dim() else number for tensor, number, vector in choices]
        if self.foreach:
            torch._foreach_mul_(self.tensors, chosen)
        else:
            for tensor, clip_coef in zip(self.tensors, chosen, strict=True):
                tensor.mul_(clip_coef)


def _multiply_(tensor: Tensor, clip_coef: float) -> None:
    if tensor.dtype in memory.DOUBLE or not 0 < clip_coef < FLOAT32_TINY:
        tensor.mul_(clip_coef)
        return
    for part in memory.by_rows(tensor):
        part.copy_(part.to(wide_dtype(part)).mul_(clip_coef))


def _zero_nonfinite_(tensor: Tensor) -> None:
    if tensor.is_complex():
        tensor.masked_fill_(~tensor.isfinite(), 0)
    else:
        tensor.nan_to_num_(0.0, 0.0, 0.0)


def grouped(tensors: Iterable[tuple[int, Tensor]], are_plain: bool = False) -> list[Group]:
    """Tensors and positions by device and dtype; one by one if operations on lists do not accept them.

    Args:
        tensors: the positions and the tensors.
        are_plain: whether all are known to be plain and real.
    """
    alike: dict[tuple[object, ...], tuple[bool, list[Tensor], list[int]]] = {}
    transformed = memory.transformed()
    for place, tensor in tensors:
        foreach = not transformed and (are_plain or (not tensor.is_complex() and memory.is_plain(tensor)))
        key = (tensor.device, tensor.dtype) if foreach else (place,)
        _, of_group, places = alike.setdefault(key, (foreach, [], []))
        of_group.append(tensor)
        places.append(place)
    return [Group(*each) for each in alike.values()]


def joint(norms: Tensor, p: float, in_range: bool) -> Tensor:
    """The joint norm of norms, none of them ``ABSENT``; ``in_range`` if their powers fit into float64."""
    if len(norms) == 1:
        return norms[0]
    if not in_range or p == 0:
        return join_present(norms, p)
    return vector_norms(norms, p)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, made without waiting for it; only a copy in host memory waits for its numbers."""
    return tensor if tensor.device == device else tensor.to(device, non_blocking=device.type != "cpu")
