"""The interface to the tensors of one call; every clipping rule is a composition of its methods.

``gather`` decides which implementation takes the tensors:

    native        the compiled kernel, for plain tensors without gaps in host memory
    operations    torch operations, for all others
    sharded       one of these, with norms that ranks agree on
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from torchclip._core import memory
from torchclip._core.scalars import Norm, Norms, clip_coefs, on_device, vector

__all__ = ["Batch", "Facts", "Norm", "Norms", "clip_each_", "to_result", "to_results"]

_FLOAT32_MAX = torch.finfo(torch.float32).max
_CPU = torch.device("cpu")


class Facts:
    """What callers need to know about the tensors; after a norm of a sharded batch, about those of all ranks.

    They are bits of plain integers: an ``enum.Flag`` takes many times as long, and torch.compile may not know
    it.
    """

    DOUBLE: Final = 1
    """Any is float64 or complex128: then results are float64."""
    COMPLEX: Final = 2
    """Any is complex."""
    SMALL: Final = 4
    """There are so few elements in host memory that multiplying them now costs less than in a fused step."""
    GAPS: Final = 8
    """Any has gaps between its elements, into which torch's fused steps on the CPU write."""
    SHARED_GRADIENT: Final = 16
    """Any is the gradient of several parameters, so that an optimizer meets it several times."""
    SHARDED: Final = 32
    """Ranks take the norm together, so that one rank alone cannot take it again."""


class Batch(ABC):
    """The distinct tensors of one call.

    Between two calls of its methods the tensors may change in any way: each call looks at their memory anew.
    A method that changes them tells autograd (version counters), and refuses what it cannot do before it
    changes anything.  The kernel's batches have the same methods.

    Args:
        tensors: the tensors, in order.
        shared: whether any of them is the gradient of several parameters.

    Attributes:
        all: the distinct tensors in order, as the user sees them.  Do not change the list.
        rest: those of which this rank holds what it may not be possible to change in place.
    """

    def __init__(self, tensors: list[Tensor], shared: bool = False) -> None:
        self.all = tensors
        self.rest: Sequence[Tensor] = tensors
        self._shared = Facts.SHARED_GRADIENT if shared else 0

    @property
    def facts(self) -> int:
        """``Facts`` of the tensors; those that torch operations handle are never ``SMALL``."""
        facts = self._shared
        dtypes = {tensor.dtype for tensor in self.all}
        if not dtypes.isdisjoint(memory.DOUBLE):
            facts |= Facts.DOUBLE
        if any(dtype.is_complex for dtype in dtypes):
            facts |= Facts.COMPLEX
        for tensor in self.all:
            if tensor.layout is torch.strided and not tensor.is_contiguous() and memory.flat(tensor) is None:
                return facts | Facts.GAPS
        return facts

    @abstractmethod
    def norm(self, p: float, /) -> Norm:
        """The norm of order ``p`` of all elements as one vector; ``ABSENT`` (-1.0) for no elements."""

    @abstractmethod
    def norms(self, p: float, /) -> Norms:
        """The norm of each tensor of ``all``; ``ABSENT`` where there are no elements."""

    @abstractmethod
    def scale_(self, clip_coef: Norm, /) -> None:
        """Multiply all elements in place; the float 1.0 changes nothing, and does nothing.

        Each product is formed in at least float32 and rounded once.
        """

    @abstractmethod
    def scale_each_(self, clip_coefs: Norms, /) -> None:
        """Multiply each tensor of ``all`` in place by its own number."""

    @abstractmethod
    def clamp_(self, limit: float, /) -> None:
        """Limit every element in place to ``[-limit, limit]``; NaN stays NaN.

        Only for batches without complex tensors.
        """

    @abstractmethod
    def zero_nonfinite_(self) -> None:
        """Set every infinite or NaN element to 0."""


def clip_each_(batch: Batch, limits: float | Norms, p: float, eps: float) -> Norms:
    """Multiply each tensor of a batch in place so that its norm is at most its limit.

    Args:
        batch: the tensors.
        limits: one for all, or one for each tensor of ``batch.all``.
        p: the order of the norms.
        eps: as for ``scalars.clip_coef``.

    Returns:
        The norms before the change.
    """
    norms = batch.norms(p)
    batch.scale_each_(clip_coefs(limits, norms, eps))
    return norms


def to_result(total_norm: Norm, batch: Batch) -> Tensor:
    """The norm as a 0-dim tensor: float64 if any gradient is, else float32, where the first gradient is."""
    dtype = _result_dtype(batch)
    if not isinstance(total_norm, (int, float)):
        return total_norm.clamp(min=0.0).to(_result_device(batch, total_norm.device), dtype)
    # No norm means 0; a number beyond float32 becomes infinite, where torch would raise.
    value = 0.0 if total_norm < 0 else total_norm
    if dtype is torch.float32 and value > _FLOAT32_MAX:
        value = math.inf
    return torch.full((), value, dtype=dtype, device=_result_device(batch, _CPU))


def to_results(norms: Norms, batch: Batch) -> Tensor:
    """Several norms as a one-dimensional tensor, like those of ``to_result``."""
    device = _result_device(batch, _CPU)
    if isinstance(norms, list) and device == _CPU:
        return vector([0.0 if norm < 0 else norm for norm in norms]).to(_result_dtype(batch))
    return on_device(norms, device).clamp(min=0.0).to(_result_dtype(batch))


def _result_dtype(batch: Batch) -> torch.dtype:
    return torch.float64 if batch.facts & Facts.DOUBLE else torch.float32


def _result_device(batch: Batch, otherwise: torch.device) -> torch.device:
    return batch.all[0].device if batch.all else otherwise
