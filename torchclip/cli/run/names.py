"""A program's names for its optimizers and parameters, looked up once, when an optimizer first steps."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from torchclip.clipper.names import names_in

_MOST_ITEMS = 100  # the largest list or dictionary that is searched


def variable_names(optimizer: Optimizer) -> list[str]:
    """The running program's names for an optimizer, the most likely first."""
    return list(dict.fromkeys(name for name, value in _objects() if value is optimizer and name != "self"))


def unique_labels(candidates: Sequence[Sequence[str]], kinds: Sequence[str]) -> list[str]:
    """A unique name with its class for each of several optimizers, or the class and a number.

    Args:
        candidates: the possible names of each, the most likely first.
        kinds: the class of each.
    """
    labels: list[str] = []
    for i, (own, kind) in enumerate(zip(candidates, kinds, strict=True)):
        others = {name for j, other in enumerate(candidates) if j != i for name in other}
        number = f" {kinds[:i].count(kind) + 1}" if kinds.count(kind) > 1 else ""
        name = next((name for name in own if name not in others), None)
        labels.append(f"{kind}{number}" if name is None else f"{name} ({kind})")
    return labels


def parameter_names(optimizer: Optimizer) -> dict[int, str]:
    """The names of an optimizer's parameters, by their ``id``: its own, a module's, or their position."""
    names: dict[int, str] = {}
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
        for parameter, name in zip(group["params"], group.get("param_names", ()), strict=False):
            names[id(parameter)] = name
    missing = {id(parameter) for parameter in parameters} - names.keys()
    if missing:
        names |= _names_by_modules(missing)
    for i, parameter in enumerate(parameters):
        shape = "×".join(map(str, parameter.shape)) or "a number"
        names.setdefault(id(parameter), f"parameter {i} ({shape})")
    return names


def _names_by_modules(missing: set[int]) -> dict[int, str]:
    """Names from as few of the program's modules as have all missing parameters."""
    known: dict[int, tuple[str, dict[int, str]]] = {}
    for name, held in _objects():
        if isinstance(held, nn.Module) and id(held) not in known:
            own = {id(p): of_p for p, of_p in names_in([held]) if id(p) in missing}
            known[id(held)] = re.sub(r"^\w+\.", "", name), own
    names: dict[int, str] = {}
    used = 0
    while missing and known:
        key = max(known, key=lambda each: len(known[each][1].keys() & missing))
        owner, own = known.pop(key)
        covered = own.keys() & missing
        if not covered:
            break
        used += 1
        prefix = "" if used == 1 and covered == missing else f"{owner}."
        names |= {each: prefix + own[each] for each in covered}
        missing = missing - covered
    return names


def _objects() -> Iterator[tuple[str, Any]]:
    """The values of the program's variables and of their attributes, and the items of both, by name."""
    scopes = [*_scopes()]
    for scope in scopes:
        yield from scope.items()
    for scope in scopes:
        for owner, value in scope.items():
            for name, held in _attributes(value).items():
                yield name if owner == "self" else f"{owner}.{name}", held
                yield from _items(name, held)
            yield from _items(owner, value)


def _scopes() -> Iterator[Mapping[str, Any]]:
    """The variables of the script itself, and of the running functions, outermost first."""
    main = sys.modules["__main__"]
    yield _variables(vars(main))
    frames = []
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if module not in ("torch", "torchclip", "runpy") and frame.f_locals is not vars(main):
            frames.append(frame)
        frame = frame.f_back
    for frame in reversed(frames):
        yield _variables(frame.f_locals)


def _variables(scope: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in list(scope.items())
        if not name.startswith("__") and not isinstance(value, (types.ModuleType, type))
    }


def _attributes(value: object) -> dict[str, Any]:
    if isinstance(value, (nn.Module, Optimizer, types.FunctionType)):
        return {}
    attributes = getattr(value, "__dict__", None)
    return dict(attributes) if type(attributes) is dict else {}


def _items(name: str, value: object) -> Iterator[tuple[str, Any]]:
    """The optimizers and modules in a list or a dictionary."""
    if isinstance(value, (list, tuple, dict)) and len(value) <= _MOST_ITEMS:
        pairs = list(value.items()) if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            if isinstance(item, (nn.Module, Optimizer)):  # the keys of others may be large, or have no repr
                yield f"{name}[{key!r}]", item
