"""Names for a program's optimizers and parameters, looked up when an optimizer first steps."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import takewhile
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.optim import Optimizer

from torchclip.clipper.names import unwrapped_names


class Modules:
    """All modules that the program makes, from which parameters have their names.

    Torch's hooks tell which module is a part of which when it becomes one.  So it does not matter whether a
    module is called, and nothing runs in forward passes.
    """

    def __init__(self) -> None:
        self._made: WeakSet[nn.Module] = WeakSet()
        self._parts: WeakSet[nn.Module] = WeakSet()

    def attach(self, stack: ExitStack) -> None:
        """Look on until the stack is closed."""
        stack.callback(hooks.register_module_module_registration_hook(self._has_part).remove)
        stack.callback(hooks.register_module_parameter_registration_hook(self._has_parameter).remove)

    def _has_part(self, module: nn.Module, _: str, part: nn.Module | None) -> None:
        self._made.add(module)
        if part is not None:
            self._made.add(part)
            self._parts.add(part)

    def _has_parameter(self, module: nn.Module, *_: Any) -> None:
        self._made.add(module)

    def name(self, optimizer: Optimizer) -> dict[int, str]:
        """An optimizer's parameters by their ``id``: its own names, a module's, or position and shape."""
        names: dict[int, str] = {}
        parameters: list[Tensor] = []
        for group in optimizer.param_groups:
            parameters += group["params"]
            for parameter, name in zip(group["params"], group.get("param_names", ()), strict=False):
                names[id(parameter)] = name
        roots = [module for module in self._made if module not in self._parts]
        # A part may have lost its whole.
        for modules in ([*roots, *_of_script()], self._made):
            missing = [id(parameter) for parameter in parameters if id(parameter) not in names]
            if missing:
                names |= _names_in(modules, missing)
        for i, parameter in enumerate(parameters):
            shape = "×".join(map(str, parameter.shape)) or "a number"
            names.setdefault(id(parameter), f"parameter {i} ({shape})")
        return {id(parameter): names[id(parameter)] for parameter in parameters}


def _of_script() -> Iterator[nn.Module]:
    """The modules of the script's variables, and of their attributes."""
    for value in [*vars(sys.modules["__main__"]).values()]:
        if not isinstance(value, (types.ModuleType, type)):
            attributes = getattr(value, "__dict__", None)
            inner = attributes.values() if type(attributes) is dict else ()
            yield from (each for each in (value, *inner) if isinstance(each, nn.Module))


def _names_in(modules: Iterable[nn.Module], missing: Sequence[int]) -> dict[int, str]:
    """Names from as few modules as have the missing parameters; of several, each has its class in front."""
    known = []
    for module in {id(each): each for each in modules}.values():
        of_module = {id(parameter): name for name, parameter in unwrapped_names(module)}
        held = {key: of_module[key] for key in missing if key in of_module}
        if held:
            known.append((type(module).__name__, held))
    used: list[tuple[str, dict[int, str]]] = []
    left = set(missing)
    while known and left:
        kind, held = max(known, key=lambda each: len(each[1].keys() & left))
        found = {key: name for key, name in held.items() if key in left}
        if not found:
            break
        used.append((kind, found))
        left -= found.keys()
    used.sort(key=lambda each: missing.index(next(iter(each[1]))))
    names: dict[int, str] = {}
    kinds = [kind for kind, _ in used]
    for i, (kind, found) in enumerate(used):
        number = f" {kinds[: i + 1].count(kind)}" if kinds.count(kind) > 1 else ""
        prefix = f"{kind}{number}." if len(used) > 1 else ""
        names |= {key: prefix + name for key, name in found.items()}
    return names


def labels(optimizers: Sequence[tuple[str, str | None, Iterable[str]]]) -> list[str]:
    """A unique name for each of several optimizers.

    Args:
        optimizers: of each the class, its variable in the script, and its parameters' names.
    """
    several = len(optimizers) > 1
    parts = [variable or (several and _common(names)) or "" for _, variable, names in optimizers]
    found = [
        f"{part} ({kind})" if part else kind for part, (kind, _, _) in zip(parts, optimizers, strict=True)
    ]
    numbers = [found[: i + 1].count(label) for i, label in enumerate(found)]
    return [
        f"{label} {number}" if found.count(label) > 1 else label
        for label, number in zip(found, numbers, strict=True)
    ]


def _common(names: Iterable[str]) -> str:
    """The module that all parameters are in."""
    paths = [name.split(".")[:-1] for name in names]
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
    return ".".join(shared)


def variable_of(optimizer: Optimizer) -> str | None:
    """The script's own variable that is an optimizer, or that has it in a list or as an attribute."""
    for name, value in [*vars(sys.modules["__main__"]).items()]:
        if value is optimizer:
            return name
        if isinstance(value, (list, tuple)):
            for i, each in enumerate(value):
                if each is optimizer:
                    return f"{name}[{i}]"
    return None
