"""The compiled CPU kernel, as ``torchclip._core`` sees it; the source is ``csrc``."""

from collections.abc import Callable, Iterable
from types import GeneratorType
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

def connect(
    tensor: type[Tensor],
    parameter: type[Tensor],
    exchange_api: Any,
    increment_version: Callable[[list[Tensor]], None],
    get_num_threads: Callable[[], int],
    other_norms: Callable[[list[Tensor], float, bool, bool], float | list[float]],
    checks: tuple[tuple[Callable[..., object], object, object, Callable[[], bool] | None], ...],
    is_inference_mode_enabled: Callable[[], bool],
    strided: torch.layout,
    library: str,
    /,
) -> None:
    """Give the kernel what it needs of torch; once, before anything else.

    Args:
        tensor: ``torch.Tensor``.
        parameter: ``torch.nn.Parameter``. Only tensors of exactly these two types are taken.
        exchange_api: the capsule ``torch.Tensor.__dlpack_c_exchange_api__``.
        increment_version: called with the tensors that are about to be written.
        get_num_threads: ``torch.get_num_threads``; called where the tensors are large enough for several.
        other_norms: called with tensors, an order other than 1, 2 and inf, and whether to return a list with
            the norm of each, or that of all as one vector.
        checks: ``torchclip._core.memory.CHECKS``; the kernel takes nothing while one fails.
        is_inference_mode_enabled: says whether tensors that are made now can only be used in that mode.
        strided: ``torch.strided``, the layout of dense tensors.
        library: the path of a library that was linked to torch's OpenMP, whose threads are used.

    Raises:
        RuntimeError: if the table is not of DLPack's version 1.
    """

def connect_modules(
    module: type[nn.Module],
    parameter_list: type[nn.ParameterList],
    generator: type[GeneratorType[Any, Any, Any]],
    names: tuple[str, ...],
    /,
) -> None:
    """Give the kernel what it needs to walk modules; without that it walks none.

    Args:
        module: ``torch.nn.Module``.
        parameter_list: ``torch.nn.ParameterList``, which is a list of items.
        generator: the type of what ``Module.parameters`` returns.
        names: the five methods of a module that must be torch's own, and the dictionaries with its own
            parameters and with the modules below it.
    """

def clip_grad_norm(
    parameters: object,
    max_norm: object,
    norm_type: object,
    error_if_nonfinite: object,
    group: object,
    /,
) -> Tensor | None:
    """The usual call of ``torchclip.clip_grad_norm_`` in one go: what it returns, to the bit.

    None for any other call, with nothing changed: then a ``Batch`` has to be made, with its errors.
    ``functions.h`` says what is usual.  A module, and a generator of ``Module.parameters``
    that was not started, are walked where that is sure to give the same parameters; the generator is used up
    then.
    """

def clip_grad_value(parameters: object, clip_value: object, /) -> Literal[True] | None:
    """The usual call of ``torchclip.clip_grad_value_`` in one go; True if it was."""

def clip_grad_each(parameters: object, limit: object, norm_type: object, is_rms: bool, /) -> Tensor | None:
    """The usual call of ``torchclip.clip_grad_norm_per_parameter_`` in one go, or of ``clip_grad_rms_``.

    Root mean squares of float64 are left to Python, as they may fit into float64 where the norms do not.
    """

def clip_grad_adaptive(
    parameters: object, clip_factor: object, eps: object, norm_type: object, grad_scale: float, /
) -> Literal[True] | None:
    """The usual call of ``torchclip.clip_grad_adaptive_`` in one go, without float64.

    ``grad_scale`` is what the gradients are still multiplied by.
    """

def clip_per_example(grads: object, max_norm: object, /) -> tuple[list[Tensor], Tensor] | None:
    """The usual call of ``torchclip.clip_per_example`` in one go."""

def gradients(parameters: Iterable[Tensor], /) -> Batch | None:
    """A batch of the parameters' gradients, in order, each once; parameters without one are passed over.

    None if the kernel does not take all of them, or an item is not exactly a Tensor or a Parameter; also
    while the kernel is disabled, or operations are intercepted, so that all of them must be torch's.
    """

def tensors(tensors: list[Tensor], /) -> Batch | None:
    """A batch of the tensors themselves, in order, each once; None where ``gradients`` gives None."""

def measured(
    parameters: Iterable[Tensor], norm_type: float, each: bool, /
) -> tuple[Batch, float | list[float]] | None:
    """The batch of ``gradients`` with its ``norm``, or with ``each`` its ``norms``; memory is looked up once.

    None also if there is no loop for the order.
    """

def fingerprint(parameters: Iterable[Tensor], /) -> bytes | None:
    """Eight bytes for each gradient of the batch of ``gradients``: other ones if it was replaced or changed.

    They depend on the address, the version counter, the number of elements, and the bits of one number in
    it, neither 0 nor infinite nor NaN if there is one: new gradients often have the addresses
    and versions of old ones, and ``GradScaler.unscale_`` changes no version.
    """

def taken(tensors: list[Tensor], /) -> list[bool] | None:
    """For each tensor whether the kernel takes it; None if all operations must be torch's."""

def disable() -> None:
    """Take no tensor from now on, in any thread, until ``enable`` was called as often as this."""

def enable() -> None:
    """Undo one ``disable``.

    Raises:
        RuntimeError: if there is none to undo.
    """

def is_enabled() -> bool:
    """Whether every ``disable`` was undone."""

def instruction_set() -> str:
    """The one in use: ``"avx512"``, ``"avx2"`` or ``"baseline"``."""

def select(instruction_set: str | None, /) -> None:
    """Use another instruction set from now on, to compare; ``None`` for what is best, as at the start.

    Raises:
        ValueError: if this machine or this build does not have it.
    """

@final
class Batch:
    """Tensors to work on together; a ``torchclip._core.batch.Batch``, whose methods are described there.

    The kernel takes plain CPU tensors of float32, float64, float16, bfloat16, complex64 and complex128 that
    have no gaps between their elements, in any order of their axes.

    Only references are kept.  Each method reads from the tensors where their memory lies now, after all
    Python code that the call runs.  A tensor that changed so that it cannot be taken any more raises a
    RuntimeError, before anything is written.  Results do not depend on the number of threads.
    """

    @property
    def all(self) -> list[Tensor]:
        """The distinct tensors, in order. Not to be changed."""
    @property
    def facts(self) -> int:
        """``torchclip._core.batch.Facts`` of the tensors, as they were when the batch was made."""
    @property
    def rest(self) -> tuple[()]:
        """Tensors that the kernel does not take: none."""
    def norm(self, p: float, /) -> float:
        """The norm of all tensors as one vector; -1 if there is no element."""
    def norms(self, p: float, /) -> list[float]:
        """The norm of each tensor of ``all``; -1 where there is no element."""
    def scale_(self, clip_coef: float | Tensor, /) -> None:
        """Multiply the tensors in place; by 1 not at all.

        Products are formed in float32 (of float64 in float64) and rounded.
        """
    def scale_each_(self, clip_coefs: Iterable[float | Tensor], /) -> None:
        """Multiply each tensor by its own number of those given for ``all``."""
    def clip_each_(self, limits: float | Iterable[float | Tensor], p: float, eps: float, /) -> list[float]:
        """Scale each tensor in place to its own limit, while it is in the cache; the norms before.

        ``limits`` is a number for all, or one for each tensor of ``all``.
        """
    def clamp_(self, limit: float, /) -> None:
        """Limit every element in place to ``[-limit, limit]``; nan stays nan.

        Raises:
            ValueError: if a tensor is complex, before anything is written.
        """
    def zero_nonfinite_(self) -> None:
        """Set every element to 0 that is infinite or nan, in either part of a complex one."""
