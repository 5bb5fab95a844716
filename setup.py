"""Builds the optional CPU kernel; everything else about the package stands in pyproject.toml.

Where it cannot be compiled, the install goes on without it, and torch's own operations do the work.

Environment: ``TORCHCLIP_KERNEL=0`` leaves the kernel out; ``TORCHCLIP_SANITIZE=1`` builds it with GCC's
address and undefined-behaviour sanitizers, for its tests (see tests/csrc/test_kernel.py).
"""

import os
import platform
import sys
import sysconfig
from glob import glob

from setuptools import Extension, setup


def wanted() -> bool:
    """Whether to try: the limited API is CPython's, and no part of it without the GIL."""
    suitable = platform.python_implementation() == "CPython" and not sysconfig.get_config_var(
        "Py_GIL_DISABLED"
    )
    return suitable and os.environ.get("TORCHCLIP_KERNEL") != "0"


def flags() -> tuple[list[str], list[str]]:
    """What to tell the compiler and the linker."""
    if sys.platform == "win32":
        return ["/std:c++17", "/O2"], []
    # Contraction into fused multiply-adds would make sums depend on the instruction set.
    compiling = ["-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
    # On Linux torch brings GNU's OpenMP, and the kernel shares its threads; elsewhere one thread is used.
    both = ["-fopenmp"] if sys.platform == "linux" else []
    if os.environ.get("TORCHCLIP_SANITIZE") == "1":
        both += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        compiling += ["-O1", "-g", "-fno-omit-frame-pointer"]
    else:
        compiling += ["-O3", "-g0"]
    return compiling + both, both


compiling, linking = flags()
kernel = Extension(
    "torchclip._kernel",
    sources=["torchclip/csrc/module.cpp"],
    depends=sorted(glob("torchclip/csrc/*.h")),
    language="c++",
    extra_compile_args=compiling,
    extra_link_args=linking,
    py_limited_api=True,
    optional=True,
)

if wanted():
    setup(ext_modules=[kernel], options={"bdist_wheel": {"py_limited_api": "cp310"}})
else:
    setup()
