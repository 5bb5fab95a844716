"""The compiled CPU kernel, as ``torchclip.kernel`` sees it; the source is ``_kernel.cpp``."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

from torch import Tensor

openmp: bool
"""Whether several threads can be used."""

def connect(
    tensor: type[Tensor],
    parameter: type[Tensor],
    exchange_api: Any,
    increment_version: Callable[[list[Tensor]], None],
    refuse: Callable[[str, int, object], object],
    /,
) -> None:
    """Give the kernel what it needs of torch; once, before anything else.

    Args:
        tensor: ``torch.Tensor``.
        parameter: ``torch.nn.Parameter``. Only tensors of exactly these two types are taken.
        exchange_api: the capsule ``torch.Tensor.__dlpack_c_exchange_api__``.
        increment_version: called with the tensors that are about to be written.
        refuse: called with ``"parameters"`` or ``"tensors"``, an index and the item found there if that is
            not a tensor; must raise.

    Raises:
        RuntimeError: if the table is not of DLPack's version 1.
    """

def gradients(parameters: Iterable[Tensor], /) -> Batch:
    """A batch of the parameters' gradients, in order, each once; parameters without one are passed over."""

def tensors(tensors: Iterable[Tensor], /) -> Batch:
    """A batch of the tensors themselves, in order, each once."""

def scalar(value: float, double: bool, /) -> Tensor:
    """A 0-dim CPU tensor of float64 or float32, made faster than ``torch.scalar_tensor`` makes it."""

def instruction_set() -> str:
    """The one in use: ``"avx512"``, ``"avx2"`` or ``"baseline"``."""

def select(instruction_set: str, /) -> None:
    """Use another instruction set from now on, to compare.

    Raises:
        ValueError: if this machine or this build does not have it.
    """

@final
class Batch:
    """Tensors to work on together.

    The kernel takes plain CPU tensors of float32, float64, float16, bfloat16, complex64 and complex128 whose
    elements do not share memory. ``threads`` is the most threads to use; results do not depend on it. Tensors
    must keep their memory (no ``resize_``, ``set_``) between the making of the batch and its use.
    """

    @property
    def all(self) -> list[Tensor]:
        """The distinct tensors, in order. Not to be changed."""
    @property
    def rest(self) -> Sequence[Tensor]:
        """Those that the kernel does not take, in order. Not to be changed."""
    @property
    def count(self) -> int:
        """The number of items seen, with those that had no gradient or came a second time."""
    @property
    def subclassed(self) -> bool:
        """Whether any of the items is of a subclass of Tensor other than Parameter."""
    @property
    def double(self) -> bool:
        """Whether any of the taken tensors is of float64 or complex128."""
    @property
    def complex(self) -> bool:
        """Whether any of the taken tensors is complex."""
    def norm(self, order: float, threads: int, /) -> float:
        """The norm, of order 1, 2 or inf, of all taken tensors as one vector; 0 for none."""
    def norms(self, order: float, threads: int, /) -> list[float | None]:
        """The norm of each tensor of ``all``, None for the rest."""
    def scale(self, factor: float, threads: int, /) -> None:
        """Multiply the taken tensors in place: products in float64 (float32 for 16-bit ones), rounded."""
    def scale_each(self, factors: Sequence[Any], threads: int, /) -> None:
        """Multiply each by its own factor; those with None, and the rest, are left alone."""
    def clamp(self, limit: float, threads: int, /) -> None:
        """Limit every element in place to ``[-limit, limit]``; nan stays nan.

        Raises:
            ValueError: if a taken tensor is complex, before anything is written.
        """
