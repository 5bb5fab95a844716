"""The interface to the tensors of one call; every clipping rule is a composition of its methods.

``gather`` decides which implementation takes which tensors:

    native        the compiled kernel, for plain dense tensors in host memory
    host          torch operations on other tensors in host memory: sparse ones, subclasses, other dtypes
    accelerator   torch operations that never wait for a value: other devices, and traced operations
    mixed         several of those in one call
    sharded       any of those, with norms that ranks agree on
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, TypeAlias

from torch import Tensor

__all__ = ["Batch", "Facts", "Norm", "Norms"]

Norm: TypeAlias = float | Tensor
"""A number known on the host, or a 0-dim float64 tensor for which the host should not wait."""

Norms: TypeAlias = "list[float] | Tensor"
"""Several such numbers: a list, or a float64 tensor of one dimension."""


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
    SHARED: Final = 16
    """Any is the gradient of several parameters, so that an optimizer meets it several times."""
    SHARDED: Final = 32
    """Ranks take the norm together, so that one rank alone cannot take it again."""


class Batch(Protocol):
    """The distinct tensors of one call.

    Between two calls of its methods the tensors may change in any way: each call looks at their memory anew.
    A method that changes them tells autograd (version counters), and refuses what it cannot do before it
    changes anything.
    """

    @property
    def all(self) -> list[Tensor]:
        """The distinct tensors in order, as the user sees them.  Do not change the list."""

    @property
    def facts(self) -> int:
        """``Facts`` of the tensors."""

    def norm(self, p: float, finite: bool = False, /) -> Norm:
        """The norm of order ``p`` of all elements as one vector; ``scalars.ABSENT`` (-1.0) for no elements.

        With ``finite`` (for an order above 0) only finite elements count; ``ABSENT`` if there are none.
        """

    def norms(self, p: float, finite: bool = False, /) -> Norms:
        """The norm of each tensor of ``all``, likewise."""

    def scale_(self, clip_coef: Norm, /) -> None:
        """Multiply all elements in place; the float 1.0 changes nothing, and does nothing.

        Each product is formed in at least float32 and rounded once.
        """

    def scale_each_(self, clip_coefs: Norms, /) -> None:
        """Multiply each tensor of ``all`` in place by its own number."""

    def clip_each_(self, limits: Norm | Sequence[float], p: float, eps: float, /) -> Norms:
        """Multiply each tensor in place so that its norm is at most its limit.

        Args:
            limits: one for all, or one for each tensor of ``all``.
            p: the order of the norms.
            eps: as for ``scalars.clip_coef``.

        Returns:
            The norms before the change.
        """

    def clamp_(self, limit: float, /) -> None:
        """Limit every element in place to ``[-limit, limit]``; NaN stays NaN.

        Only for batches without complex tensors.
        """

    def zero_nonfinite_(self) -> None:
        """Set every infinite or NaN element to 0."""
