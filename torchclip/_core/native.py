"""The compiled kernel: loading it, and turning it off."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from torch import Tensor, nn

from torchclip._core import arguments
from torchclip._core.batch import Norm, Norms
from torchclip._core.host import HostBatch

__all__ = ["extension", "status", "use"]

extension: Any
"""The module ``torchclip._kernel`` while it is in use, else None.  To be read through this module."""
_reason: str


def use(module: Any, reason: str) -> tuple[Any, str]:
    """Use the extension from now on or, for a reason, none; returns what was used before."""
    global extension, _reason
    before = extension, _reason
    extension, _reason = module, reason
    return before


def status() -> str:
    """One line on whether the kernel is active, and why not if it is not."""
    if extension is None:
        return _reason
    # Outside of Linux there is no OpenMP that could be shared with torch.
    return f"active ({extension.instruction_set()}{'' if extension.openmp else ', one thread'})"


def _other_norms(tensors: list[Tensor], p: float, finite: bool, each: bool) -> Norm | Norms:
    """Norms of orders that the kernel has no loops for."""
    batch = HostBatch(tensors)
    return batch.norms(p, finite) if each else batch.norm(p, finite)


def _load() -> tuple[Any, str]:
    """The extension, or None and the reason why it is not there."""
    if os.environ.get("TORCHCLIP_KERNEL") == "0":
        return None, "off (TORCHCLIP_KERNEL=0)"
    exchange_api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exchange_api is None:
        return None, f"off (torch {torch.__version__} has no DLPack exchange table; a newer one has)"
    try:
        module = importlib.import_module("torchclip._kernel")
    except ImportError as error:
        return None, f"off (the extension was not built or cannot be loaded: {error})"
    try:
        module.connect(
            Tensor,
            nn.Parameter,
            exchange_api,
            torch._C._increment_version,
            arguments.refuse_item,
            torch.get_num_threads,
            _other_norms,
        )
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        return None, f"off (torch {torch.__version__} does not fit: {error})"
    return module, ""


extension, _reason = _load()
