"""How the kernel is built: what each platform's compiler is told, by the platform's name alone."""

import platform
import re
import runpy
import shlex
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import setuptools  # type: ignore[import-untyped]

import torchclip

SETUP = Path(__file__).parents[2] / "setup.py"


@pytest.fixture
def as_on(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("TORCHCLIP_KERNEL", "TORCHCLIP_SANITIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def asked_for(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``setup.py`` asks for."""
    asked: dict[str, Any] = {}
    patch.setattr(setuptools, "setup", asked.update)
    patch.chdir(SETUP.parent)
    runpy.run_path(str(SETUP))
    return asked


def extensions(patch: pytest.MonkeyPatch) -> list[Any]:
    """The extensions that it asks for."""
    found: list[Any] = asked_for(patch).get("ext_modules", [])
    return found


@pytest.mark.parametrize(
    ("system", "compiling"),
    [
        ("linux", {"-std=c++17", "-O3", "-ffp-contract=off"}),
        ("darwin", {"-std=c++17", "-O3", "-ffp-contract=off"}),
        ("win32", {"/std:c++17", "/O2"}),
    ],
)
def test_flags_go_by_the_platforms_name(as_on: pytest.MonkeyPatch, system: str, compiling: set[str]) -> None:
    as_on.setattr(sys, "platform", system)
    (kernel,) = extensions(as_on)
    assert compiling <= set(kernel.extra_compile_args)
    assert {flag[0] for flag in kernel.extra_compile_args} == ({"/"} if system == "win32" else {"-"})
    for flags in (kernel.extra_compile_args, kernel.extra_link_args):
        assert not any("openmp" in flag for flag in flags)  # torch's is looked up when the kernel is loaded
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


def test_links_of_the_long_description_work_outside_of_the_repository(as_on: pytest.MonkeyPatch) -> None:
    text = asked_for(as_on)["long_description"]
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) > 10
    prefixes = (
        f"https://github.com/torchclip/torchclip/blob/v{torchclip.__version__}/",
        f"https://raw.githubusercontent.com/torchclip/torchclip/v{torchclip.__version__}/",
    )
    for link in links:
        assert link.startswith("https://")
        for prefix in prefixes:
            if link.startswith(prefix):
                assert (SETUP.parent / link.removeprefix(prefix).partition("#")[0]).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler of this test is a shell script")
def test_what_the_compiler_said_is_kept(as_on: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = asked_for(as_on)["cmdclass"]["build_ext"]
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'module.cpp:3:10: fatal error: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    for name in ("CC", "CXX"):
        as_on.setenv(name, shlex.quote(str(compiler)))
    extension = setuptools.Extension(
        "torchclip._kernel", sources=["torchclip/csrc/python/module.cpp"], optional=True
    )
    build = command(setuptools.Distribution({"ext_modules": [extension]}))
    build.build_lib, build.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
    (tmp_path / "lib" / "torchclip").mkdir(parents=True)
    build.ensure_finalized()
    build.run()
    note = tmp_path / "lib" / "torchclip" / "_not_built.txt"
    assert note.read_text() == "module.cpp:3:10: fatal error: no such thing"
