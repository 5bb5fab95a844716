"""Builds the optional CPU kernel; pyproject.toml describes the rest of the package.

If it cannot be compiled, the install continues without it, and torch operations do the work.  Then
``torchclip info`` shows what the compiler said.

Environment: ``TORCHCLIP_KERNEL=0`` builds no kernel; with ``TORCHCLIP_KERNEL=1`` the install fails if the
    kernel cannot be built; ``TORCHCLIP_SANITIZE=1`` builds it with GCC's address and undefined-behavior
    sanitizers, for its tests (see tests/csrc/test_kernel.py).
"""

import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

REPOSITORY = "https://github.com/torchclip/torchclip"


def wanted() -> bool:
    """Whether to build: only CPython has the limited API, and not without the GIL."""
    suitable = platform.python_implementation() == "CPython" and not sysconfig.get_config_var(
        "Py_GIL_DISABLED"
    )
    return suitable and os.environ.get("TORCHCLIP_KERNEL") != "0"


def flags() -> tuple[list[str], list[str]]:
    """The options of the compiler and the linker."""
    if sys.platform == "win32":
        return ["/std:c++17", "/O2"], []
    # Contraction into fused multiply-adds would make sums depend on the instruction set.
    compiling = ["-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
    both: list[str] = []
    if os.environ.get("TORCHCLIP_SANITIZE") == "1":
        both += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        compiling += ["-O1", "-g", "-fno-omit-frame-pointer"]
    else:
        compiling += ["-O3", "-g0"]
    # Looking up torch's threads needs a separate library on old Linux systems.
    target = os.environ.get("_PYTHON_HOST_PLATFORM", sys.platform)  # tools/wheels sets another one
    return compiling + both, both + (["-ldl"] if target.startswith("linux") else [])


@contextmanager
def heard(lines: list[str]) -> Iterator[None]:
    """Add what compilers print within the context to `lines`; it is still printed, at the end."""
    sys.stdout.flush()
    sys.stderr.flush()
    streams = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, stream in enumerate(streams, start=1):
                os.dup2(stream, number)
                os.close(stream)
            file.seek(0)
            said = file.read().decode(errors="replace")
            sys.stderr.write(said)
            lines += said.splitlines()


class BuildKernel(build_ext):
    """Builds the kernel; if that fails, stores the reason in a file, which `torchclip info` shows."""

    reason = ""

    def build_extension(self, ext: Extension) -> None:
        """Build it, and keep the reason if that fails."""
        lines: list[str] = []
        try:
            with heard(lines):
                super().build_extension(ext)
        except Exception as error:
            errors = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
            self.reason = (errors or [self.describe(error)])[0].strip()
            raise

    def get_ext_filename(self, fullname: str) -> str:
        """With the suffix of the target platform, which setuptools ignores for the stable ABI."""
        filename, suffix = super().get_ext_filename(fullname), os.environ.get("SETUPTOOLS_EXT_SUFFIX")
        return filename.partition(".")[0] + suffix if suffix else filename

    @staticmethod
    def describe(error: BaseException | None) -> str:
        """The error in one line, without the full command if a command failed."""
        text = str(error)
        while error is not None:
            if isinstance(error, subprocess.CalledProcessError):
                return f"{error.cmd[0]} ended with status {error.returncode}"
            error = error.__cause__ or error.__context__
        return text

    def run(self) -> None:
        """Put the reason where the extension would be; remove that of an earlier build."""
        super().run()
        if self.inplace:
            package = self.get_finalized_command("build_py").get_package_dir("torchclip")
        else:
            package = os.path.join(self.build_lib, "torchclip")
        note = Path(package, "_not_built.txt")
        if self.reason:
            note.write_text(self.reason, encoding="utf-8")
        else:
            note.unlink(missing_ok=True)


def long_description() -> str:
    """The README, with links and pictures that work outside the repository, at the version's tag."""
    version = re.search('__version__ = "(.*)"', Path("torchclip/__init__.py").read_text(encoding="utf-8"))[1]
    readme = Path("README.md").read_text(encoding="utf-8")
    for pattern, base in (
        (r"(!\[[^\]]*\]\()(?!https?:)", f"https://raw.githubusercontent.com/torchclip/torchclip/v{version}/"),
        (r"(?<!!)(\[[^\]]*\]\()(?=#)", f"{REPOSITORY}/blob/v{version}/README.md"),
        (r"(?<!!)(\[[^\]]*\]\()(?!https?:)", f"{REPOSITORY}/blob/v{version}/"),
    ):
        readme = re.sub(pattern, rf"\g<1>{base}", readme)
    return readme


compiling, linking = flags()
kernel = Extension(
    "torchclip._kernel",
    sources=["torchclip/csrc/python/module.cpp"],
    depends=sorted(glob("torchclip/csrc/*/*.h")),
    language="c++",
    extra_compile_args=compiling,
    extra_link_args=linking,
    py_limited_api=True,
    optional=os.environ.get("TORCHCLIP_KERNEL") != "1",
)
readme = {"long_description": long_description(), "long_description_content_type": "text/markdown"}

if wanted():
    setup(
        **readme,
        ext_modules=[kernel],
        cmdclass={"build_ext": BuildKernel},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
else:
    setup(**readme)
