"""Tensors of one call that different implementations handle."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_

from torch import Tensor

from torchclip._core.batch import Batch, Facts, Norm, Norms
from torchclip._core.joint_norms import join
from torchclip._core.scalars import in_one


class MixedBatch(Batch):
    """Several batches as one.

    Args:
        tensors: the distinct tensors of all parts, in order.
        parts: the batches.
        tied: whether any tensor is the gradient of several parameters.
    """

    def __init__(self, tensors: list[Tensor], parts: Sequence[Batch], tied: bool) -> None:
        super().__init__(tensors, tied)
        self._parts = parts
        unsure = {id(tensor) for part in parts for tensor in part.rest}
        self.rest = [tensor for tensor in tensors if id(tensor) in unsure]

    @property
    def facts(self) -> int:
        """``Facts`` of the tensors: never small, as the kernel does not handle all of them."""
        return reduce(or_, (part.facts for part in self._parts), self._tied) & ~Facts.SMALL

    def norm(self, p: float, finite: bool = False, /) -> Norm:
        """The norm of all elements as one vector."""
        self._refuse_some_on_meta()
        return join([part.norm(p, finite) for part in self._parts], p)

    def norms(self, p: float, finite: bool = False, /) -> Norms:
        """The norm of each tensor: a list if all parts return numbers, else a tensor."""
        self._refuse_some_on_meta()
        by_part = [part.norms(p, finite) for part in self._parts]
        in_order: list[Norm] = [0.0] * len(self.all)
        for places, norms in zip(self._places(), by_part, strict=True):
            for place, norm in zip(places, norms, strict=True):
                in_order[place] = norm
        return in_one(in_order)

    def scale_(self, clip_coef: Norm, /) -> None:
        """Multiply every element in place."""
        for part in self._parts:
            part.scale_(clip_coef)

    def scale_each_(self, clip_coefs: Norms, /) -> None:
        """Multiply each tensor in place by its own number."""
        for places, part in zip(self._places(), self._parts, strict=True):
            part.scale_each_(in_one([clip_coefs[place] for place in places]))

    def clamp_(self, limit: float, /) -> None:
        """Limit every element in place to ``[-limit, limit]``."""
        for part in self._parts:
            part.clamp_(limit)

    def zero_nonfinite_(self) -> None:
        """Set every infinite or NaN element to 0."""
        for part in self._parts:
            part.zero_nonfinite_()

    def _refuse_some_on_meta(self) -> None:
        """Raise an error for tensors without values among others: they have no norm together."""
        on_meta = [place for place, tensor in enumerate(self.all) if tensor.is_meta]
        if on_meta and len(on_meta) < len(self.all):
            place = on_meta[0]
            raise TypeError(
                f"gradient {place} of shape {tuple(self.all[place].shape)} is on the device 'meta' and has "
                "no values, but other gradients have; move its parameter to a device that has values "
                "(`module.to_empty(device=...)`), or set the gradient to None (`p.grad = None`)"
            )

    def _places(self) -> list[list[int]]:
        """The positions of each part's tensors among all tensors."""
        place_of = {id(tensor): place for place, tensor in enumerate(self.all)}
        return [[place_of[id(tensor)] for tensor in part.all] for part in self._parts]
