"""The private names of torch that the package uses are those that the documentation lists, and few."""

from __future__ import annotations

import ast
import re
from collections.abc import Container, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST = 16
ALLOWED = ("_foreach_", "_amp_")
OF_PYTHON = {
    "_asdict",
    "_fields",
    "_make",
    "_getframe",
    "_current_frames",
    "_exit",
    "_args_from_interpreter_flags",
}
OF_OPACUS = {"_processed"}


def test_private_names_of_torch_are_listed_and_few() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "torchclip").rglob("*.py")]
    own = {name for tree in trees for name in _defined(tree)} | OF_PYTHON | OF_OPACUS
    found = {name for tree in trees for name in _used(tree, own)}
    for path in (ROOT / "torchclip" / "csrc").glob("*/*"):
        found |= set(re.findall(r'"(_[a-z]\w*)"', path.read_text(encoding="utf-8")))
    found = {name for name in found if not name.startswith(ALLOWED)} - {"_kernel"}
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = page.partition("## Private names of torch")[2].partition("\n## ")[0]
    names = re.findall(r"^\| `([^`]*)` \|", section, re.MULTILINE)
    listed = {_from_private(name.split("."), own) for name in names} - {""}  # names that are also one's own
    assert found == listed
    assert len(listed) <= MOST


def test_private_names_are_found() -> None:
    code = """
import torch
from torch._compile import _disable_dynamo
from torch.utils import _pytree
class Own:
    def _method(self): self._method()
torch._C._functorch.level()
tensor._version
getattr(optimizer, "_steps")
"""
    tree = ast.parse(code)
    found = set(_used(tree, set(_defined(tree))))
    expected = {"_compile._disable_dynamo", "_pytree", "_C._functorch.level", "_version", "_steps"}
    assert found == expected


def _from_private(parts: list[str], own: Container[str]) -> str:
    """The dotted name from its first private part on; empty if it has none, or is the class's own."""
    is_foreign = [part.startswith("_") and not part.startswith("__") and part not in own for part in parts]
    first = is_foreign.index(True) if any(is_foreign) else len(parts)
    return ".".join(parts[first:])


def _defined(tree: ast.AST) -> Iterator[str]:
    """The names of the members of a file's classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, (ast.FunctionDef, ast.ClassDef)):
                    yield item.name
                targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
                yield from (target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def _used(tree: ast.AST, own: Container[str]) -> Iterator[str]:
    """Private names of others: in imports, of objects, and as strings."""
    ours = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchclip")
        for alias in node.names
    }
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            parts = _parts(node)
            names += [] if parts[0] in ours else [parts]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("torchclip"):
            names += [[*(node.module or "").split("."), alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names += [[node.value]] if re.fullmatch(r"_[a-z]\w*", node.value) else []
    yield from filter(None, (_from_private(parts, own) for parts in names))


def _parts(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Attribute):
        return [*_parts(node.value), node.attr]
    return [node.id.lstrip("_") if isinstance(node, ast.Name) else ""]  # of this file
