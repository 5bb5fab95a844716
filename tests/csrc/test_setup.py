"""How the kernel is built: what each platform's compiler is told, by the platform's name alone."""

import platform
import runpy
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import setuptools  # type: ignore[import-untyped]

SETUP = Path(__file__).parents[2] / "setup.py"


@pytest.fixture
def as_on(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("TORCHCLIP_KERNEL", "TORCHCLIP_SANITIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def extensions(patch: pytest.MonkeyPatch) -> list[Any]:
    """What ``setup.py`` asks for."""
    asked: dict[str, Any] = {}
    patch.setattr(setuptools, "setup", asked.update)
    patch.chdir(SETUP.parent)
    runpy.run_path(str(SETUP))
    found: list[Any] = asked.get("ext_modules", [])
    return found


@pytest.mark.parametrize(
    ("system", "openmp", "compiling"),
    [
        ("linux", True, {"-std=c++17", "-O3", "-ffp-contract=off"}),
        ("darwin", False, {"-std=c++17", "-O3", "-ffp-contract=off"}),
        ("win32", False, {"/std:c++17", "/O2"}),
    ],
)
def test_flags_go_by_the_platforms_name(
    as_on: pytest.MonkeyPatch, system: str, openmp: bool, compiling: set[str]
) -> None:
    as_on.setattr(sys, "platform", system)
    (kernel,) = extensions(as_on)
    assert compiling <= set(kernel.extra_compile_args)
    assert {flag[0] for flag in kernel.extra_compile_args} == ({"/"} if system == "win32" else {"-"})
    for flags in (kernel.extra_compile_args, kernel.extra_link_args):
        assert ("-fopenmp" in flags) is openmp
    assert kernel.optional
    assert kernel.py_limited_api


def test_no_kernel_where_it_cannot_be_or_is_not_wanted(as_on: pytest.MonkeyPatch) -> None:
    assert len(extensions(as_on)) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHCLIP_KERNEL", "0")
        assert extensions(patch) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "python_implementation", lambda: "PyPy")
        assert extensions(patch) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sysconfig, "get_config_var", {"Py_GIL_DISABLED": 1}.get)
        assert extensions(patch) == []
