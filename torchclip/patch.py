"""Replaces torch's clipping functions with torchclip's, for code that calls torch's functions."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

from torchclip._core import arguments
from torchclip._core.ranks import meshes
from torchclip.clip_grad import norm, value

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["install", "installed", "observe", "uninstall"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _stand_in(ours: _Function, takes_gradients: bool = False) -> _Function:
    """A function of torchclip that returns the norm as torch's function does.

    It is a separate function, so that it can have a ``__wrapped__``.
    """
    names = inspect.signature(ours).parameters
    first, takes_group = next(iter(names)), "group" in names

    @functools.wraps(ours)
    def with_ranks(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get(first)
        if isinstance(given, Iterator):
            given = list(given)
            args, kwargs = ((given, *args[1:]), kwargs) if args else (args, {**kwargs, first: given})
        result = ours(*args, **kwargs)
        if result is None:
            return None
        tensors = arguments.tensor_list(first, given)
        return _as_torch_returns(
            result, tensors if takes_gradients else [t for t in tensors if t.grad is not None]
        )

    @functools.wraps(ours)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if takes_group and (_installed or (_blocks and any(_blocks))):
            groups = next(filter(None, reversed(_blocks)), _installed)
            kwargs = {"group": groups, **kwargs}
        function = with_ranks if meshes.has_ranks() else ours
        return _observer[0](function, *args, **kwargs) if _observer else function(*args, **kwargs)

    stand_in.__module__ = __name__  # where pickle finds it
    stand_in.__signature__ = inspect.signature(ours)  # type: ignore[attr-defined]  # not that of __wrapped__
    return cast(_Function, stand_in)


def _as_torch_returns(total_norm: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The norm as a DTensor if the gradients are DTensors, because callers may call ``full_tensor()`` on it.

    It is replicated on every rank, so that ``item()`` is correct, too.
    """
    found = [tensor.device_mesh for tensor in tensors if meshes.is_dtensor(tensor)]
    own = next((each for each in found if each.get_coordinate() is not None), None)
    if own is None:
        return total_norm
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(total_norm, own, [Replicate()] * own.ndim, run_check=False)


clip_grad_norm_ = _stand_in(norm.clip_grad_norm_)
clip_grad_value_ = _stand_in(value.clip_grad_value_)
clip_grads_with_norm_ = _stand_in(norm.clip_grads_with_norm_)
get_total_norm = _stand_in(norm.get_total_norm, takes_gradients=True)

_STAND_INS = (clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm)
originals = types.SimpleNamespace(**{f.__name__: getattr(torch.nn.utils, f.__name__) for f in _STAND_INS})
"""Torch's own functions, where pickle finds them while they are replaced."""
_own_places = {each: (each.__module__, each.__qualname__) for each in vars(originals).values()}
_lock = threading.RLock()
_replaced: dict[tuple[types.ModuleType, str], Any] = {}
_observer: list[Callable[..., Any]] = []
# The process groups for calls that pass no ``group``: those of ``install``, None without it, and those of
# each open block.
_installed: list[ProcessGroup] | None = None
_blocks: list[list[ProcessGroup]] = []


def install(group: ProcessGroup | Sequence[ProcessGroup] | None = None) -> list[str]:
    """Replace torch's clipping functions with torchclip's, in this process, until ``uninstall``.

    This replaces ``clip_grad_norm_``, ``clip_grad_value_``, ``clip_grads_with_norm_`` and ``get_total_norm``
    in ``torch.nn.utils`` and in ``torch.nn.utils.clip_grad``.  The ``__wrapped__`` of each new function is
    the function that it replaces.  Installing twice changes nothing, except that the last ``group`` counts.

    The norm of DTensors is a DTensor, as in torch, but replicated.  So code that calls ``full_tensor()``
    works, and code that does not call it gets the correct number, too.

    This does not change FSDP1's own method ``model.clip_grad_norm_``, nor names that were imported earlier,
    as by ``from torch.nn.utils import clip_grad_norm_``.  Install before you import modules that do this.
    (torch's ``clip_grad_norm_`` looks up ``get_total_norm`` and ``clip_grads_with_norm_`` when it is called.
    So even an old reference to it measures and scales with torchclip.)

    Args:
        group: a process group, or several, that ``clip_grad_norm_`` and ``get_total_norm`` get as their
            ``group``, for frameworks that do not know this argument.  A call that passes a ``group``, even
            None, keeps its own.  A rank outside of a group does not pass it.

    Returns:
        The names in loaded modules that still refer to one of torch's functions, as ``"module.name"``,
        sorted.  Attributes of classes and objects are not searched.

    Raises:
        TypeError: if ``group`` is neither a process group nor a list of them.

    Examples:
        >>> holders = install()
        >>> parameters = torch.nn.Linear(2, 2).parameters()
        >>> torch.nn.utils.clip_grad_norm_(parameters, max_norm=-1.0)
        Traceback (most recent call last):
        ValueError: `max_norm` must be at least 0, got -1.0 (float)
        >>> uninstall()
    """
    global _installed
    groups = meshes.as_groups(group)
    with _lock:
        _installed = groups
        _put()
        return _holders()


def uninstall() -> None:
    """Restore the functions that ``install`` or ``installed`` replaced, also within an open block."""
    global _installed
    with _lock:
        _installed = None
        _put_back()


@contextlib.contextmanager
def installed(group: ProcessGroup | Sequence[ProcessGroup] | None = None) -> Iterator[None]:
    """Like ``install``, but for a ``with`` block.

    The functions are replaced for all threads.  Blocks may be nested and may overlap.  The last block to end
    restores torch's functions, unless ``install`` was called.

    Args:
        group: as for ``install``.  Within the block it replaces the ``group`` of ``install``.

    Examples:
        >>> with installed():
        ...     norm = torch.nn.utils.get_total_norm([torch.full((4,), 1e20)])  # torch's would be inf
        >>> norm
        tensor(2.0000e+20)
    """
    groups = meshes.as_groups(group)
    with _lock:
        _blocks.append(groups)
        _put()
    try:
        yield
    finally:
        with _lock:
            _blocks[:] = [each for each in _blocks if each is not groups]
            if not _blocks and _installed is None:
                _put_back()


def observe(observer: Callable[..., Any]) -> Callable[[], None]:
    """Call a function in place of each installed function, as ``torchclip run`` does to record the calls.

    Args:
        observer: takes the installed function, which keeps its name, and its arguments.

    Returns:
        A function that ends the observation.
    """
    _observer[:] = [observer]
    return _observer.clear


def _places() -> Iterator[tuple[types.ModuleType, str, Callable[..., Any]]]:
    """Where torch keeps the functions: module, name there, and what ``install`` puts there."""
    for module in (torch.nn.utils, clip_grad):
        for function in _STAND_INS:
            # Some functions are private in the module that defines them.
            for name in (function.__name__, f"_{function.__name__}"):
                if hasattr(module, name):
                    yield module, name, function


def _put() -> None:
    if _replaced:
        return
    for function in _STAND_INS:
        vars(function)["__wrapped__"] = getattr(torch.nn.utils, function.__name__)
    for module, name, function in _places():
        _replaced[module, name] = getattr(module, name)
        setattr(module, name, function)
    for name, original in vars(originals).items():
        if original in _replaced.values():
            original.__module__, original.__qualname__ = __name__, f"originals.{name}"


def _put_back() -> None:
    for (module, name), function in _replaced.items():
        setattr(module, name, function)
    for original, place in _own_places.items():
        original.__module__, original.__qualname__ = place
    _replaced.clear()


def _holders() -> list[str]:
    originals = {id(function) for function in _replaced.values()}
    modules = [module for module in list(sys.modules.values()) if isinstance(module, types.ModuleType)]
    return sorted(
        {
            f"{module.__name__}.{name}"
            for module in modules
            for name, value in list(vars(module).items())
            if id(value) in originals
        }
    )
