"""Tensors of one call of which the kernel takes a part and torch operations take the others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torchclip._core.batch import Batch, Facts, Norm, Norms
from torchclip._core.joint_norms import join
from torchclip._core.scalars import at, concatenate


class MixedBatch(Batch):
    """Two batches as one.

    Args:
        tensors: the distinct tensors of both, in order.
        parts: the batches.
        shared: whether any tensor is the gradient of several parameters.
    """

    def __init__(self, tensors: list[Tensor], parts: Sequence[Batch], shared: bool) -> None:
        super().__init__(tensors, shared)
        self._parts = parts
        self.rest = [tensor for part in parts for tensor in part.rest]
        place_of = {id(tensor): place for place, tensor in enumerate(tensors)}
        self._places = [[place_of[id(tensor)] for tensor in part.all] for part in parts]
        in_parts = [place for places in self._places for place in places]
        self._positions = sorted(range(len(tensors)), key=in_parts.__getitem__)

    @property
    def facts(self) -> int:
        """``Facts`` of the tensors: never small, as the kernel does not handle all of them."""
        facts = self._shared
        for part in self._parts:
            facts |= part.facts
        return facts & ~Facts.SMALL

    def norm(self, p: float, /) -> Norm:
        """The norm of all elements as one vector."""
        return join([part.norm(p) for part in self._parts], p)

    def norms(self, p: float, /) -> Norms:
        """The norm of each tensor: a list if both parts return numbers, else a tensor."""
        return at(concatenate([part.norms(p) for part in self._parts]), self._positions)

    def scale_(self, clip_coef: Norm, /) -> None:
        """Multiply every element in place."""
        for part in self._parts:
            part.scale_(clip_coef)

    def scale_each_(self, clip_coefs: Norms, /) -> None:
        """Multiply each tensor in place by its own number."""
        for part, places in zip(self._parts, self._places, strict=True):
            part.scale_each_(at(clip_coefs, places))

    def clamp_(self, limit: float, /) -> None:
        """Limit every element in place to ``[-limit, limit]``."""
        for part in self._parts:
            part.clamp_(limit)

    def zero_nonfinite_(self) -> None:
        """Set every infinite or NaN element to 0."""
        for part in self._parts:
            part.zero_nonfinite_()
