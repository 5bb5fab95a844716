"""The compiled kernel: loading it, and whether it is on."""

from __future__ import annotations

import importlib
import inspect
import os
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torchclip._core import memory
from torchclip._core.batch import Norm, Norms
from torchclip._core.extras import installing
from torchclip._core.operations import TorchBatch

_ADDS_TABLE = "torch_c_dlpack_ext"

NOT_BUILT = "off (the extension was not built"
"""How the status begins if there is no compiled kernel."""


def _not_taken(*_: object) -> None:
    return None


def active() -> bool:
    """Whether the kernel is loaded and not turned off at the moment."""
    return extension is not None and bool(extension.is_enabled())


def status() -> str:
    """One line on whether the kernel is active, and why not if it is not."""
    if extension is None:
        return _reason
    if not active():
        return "off (torchclip.kernel.disabled())"
    # Some builds of torch have no OpenMP whose threads could be used.
    return f"active ({extension.instruction_set()}{'' if extension.has_threads() else ', one thread'})"


def _other_norms(tensors: list[Tensor], p: float, each: bool) -> Norm | Norms:
    """Norms of orders for which the kernel has no loops."""
    batch = TorchBatch(tensors)
    return batch.norms(p) if each else batch.norm(p)


def _exchange_api() -> tuple[Any, str]:
    """Torch's DLPack exchange table; or None and the reason.

    Torch 2.10 and newer have it; the package torch-c-dlpack-ext adds it to some older versions.
    """
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if table is not None:
        return table, ""
    lacks = f"torch {torch.__version__} has no DLPack exchange table"
    try:
        importlib.import_module(_ADDS_TABLE)
    except Exception as error:  # of any kind: without the package, torch operations do the work
        if isinstance(error, ModuleNotFoundError) and error.name == _ADDS_TABLE:
            return None, f"{lacks}; 2.10 has, and for 2.7 to 2.9 {installing('kernel')} adds it"
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return None, f"{lacks}, and torch-c-dlpack-ext could not add it: {message}"
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    return table, f"{lacks}, and torch-c-dlpack-ext did not add it"


def _names_of_modules() -> tuple[str, ...] | None:
    """Methods and dictionaries of modules that a walk uses; None if somebody has replaced a method."""
    methods = ("parameters", "named_parameters", "_named_members", "named_modules")
    codes = [getattr(getattr(nn.Module, name, None), "__code__", None) for name in methods]
    if not all(code is not None and code.co_filename == nn.modules.module.__file__ for code in codes):
        return None
    return (*methods, "__getattribute__", "_parameters", "_modules")


def _load() -> tuple[Any, str]:
    """The extension; or None and the reason."""
    if os.environ.get("TORCHCLIP_KERNEL") == "0":
        return None, "off (TORCHCLIP_KERNEL=0)"
    exchange_api, reason = _exchange_api()
    if exchange_api is None:
        return None, f"off ({reason})"
    try:
        module = importlib.import_module("torchclip._kernel")
    except ImportError as error:
        note = Path(__file__).parents[1] / "_not_built.txt"  # the compiler's message, from setup.py
        if note.exists():
            return None, f"{NOT_BUILT}: {note.read_text(encoding='utf-8')})"
        return None, f"{NOT_BUILT} or cannot be loaded: {error})"
    try:
        module.connect(
            Tensor,
            nn.Parameter,
            exchange_api,
            torch._C._increment_version,
            torch.get_num_threads,
            _other_norms,
            memory.CHECKS,
            torch.is_inference_mode_enabled,
            torch.strided,
            inspect.getfile(torch.Generator),  # the library with torch's classes
        )
        names = _names_of_modules()
        if names is not None:
            module.connect_modules(nn.Module, nn.ParameterList, types.GeneratorType, names)
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        return None, f"off (torch {torch.__version__} does not fit: {error})"
    return module, ""


extension: Any
"""The module ``torchclip._kernel``, or None if it cannot be used."""
extension, _reason = _load()

# Batches of gradients and of tensors; None if torch's operations must do the work.
gradients: Callable[[Iterable[Tensor]], Any] = getattr(extension, "gradients", _not_taken)
tensors: Callable[[Iterable[Tensor]], Any] = getattr(extension, "tensors", _not_taken)
measured: Callable[[Iterable[Tensor], float, bool], Any] = getattr(extension, "measured", _not_taken)
fingerprint: Callable[[Iterable[Tensor]], bytes | None] = getattr(extension, "fingerprint", _not_taken)

# Whole calls of the public functions in the kernel, which returns None for calls that it does not take.
PerExample: TypeAlias = tuple[list[Tensor], Tensor]
clip_grad_norm: Callable[..., Tensor | None] = getattr(extension, "clip_grad_norm", _not_taken)
clip_grad_value: Callable[..., bool | None] = getattr(extension, "clip_grad_value", _not_taken)
clip_grad_each: Callable[..., Tensor | None] = getattr(extension, "clip_grad_each", _not_taken)
clip_grad_adaptive: Callable[..., bool | None] = getattr(extension, "clip_grad_adaptive", _not_taken)
clip_per_example: Callable[..., PerExample | None] = getattr(extension, "clip_per_example", _not_taken)
