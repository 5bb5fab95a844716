"""The command ``torchclip info``: versions, threads, and what is available on this machine."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata

import numpy as np
import torch

import torchclip
from torchclip import kernel
from torchclip._core.native import NOT_BUILT

__all__ = ["add_arguments", "facts", "installed_version", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no options."""


def run(_: argparse.Namespace) -> None:
    """Print one fact per line, and what to do if the kernel was not built."""
    for name, value in facts().items():
        print(f"{name:<18} {value}")
    if kernel.status().startswith(NOT_BUILT):
        print(
            "To get the kernel, install a torchclip wheel, or install a C++ compiler (Debian, Ubuntu: "
            "`apt install g++`) and then torchclip again."
        )


def facts() -> dict[str, str]:
    """Versions, threads, and what is available, by name."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        "torchclip": torchclip.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "matplotlib": installed_version("matplotlib"),
        "platform": platform.platform(),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "CPU kernel": kernel.status(),
        "torch threads": str(torch.get_num_threads()),
        "accelerator": str(accelerator) if accelerator else "none",
        "torch.distributed": "available" if torch.distributed.is_available() else "not available",
    }


def installed_version(package: str) -> str:
    """The version of a package, or ``not installed``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
