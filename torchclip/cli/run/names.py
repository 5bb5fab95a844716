"""A program's names for its optimizers and parameters, looked up once, when an optimizer first steps."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

__all__ = ["parameter_names", "unique_names", "variable_names"]

_MOST_ITEMS = 100  # the largest list or dictionary that is searched
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


def variable_names(optimizer: Optimizer) -> list[str]:
    """The running program's names for an optimizer, the most likely first."""
    found: dict[str, None] = {}
    scopes = list(_scopes())
    for scope in scopes:
        found.update(dict.fromkeys(name for name, value in scope.items() if value is optimizer))
    for scope in scopes:
        for owner, value in scope.items():
            for name, held in _attributes(value).items():
                if held is optimizer:
                    found[name if owner == "self" else f"{owner}.{name}"] = None
                found.update(dict.fromkeys(_places(name, held, optimizer)))
            found.update(dict.fromkeys(_places(owner, value, optimizer)))
    found.pop("self", None)
    return list(found)


def unique_names(candidates: Sequence[Sequence[str]], kinds: Sequence[str]) -> list[str]:
    """A unique name for each of several optimizers.

    Args:
        candidates: the possible names of each, the most likely first.
        kinds: the class of each.
    """
    if len(kinds) == 1:
        return [candidates[0][0] if candidates[0] else kinds[0]]
    names: list[str] = []
    for i, own in enumerate(candidates):
        others = {name for j, other in enumerate(candidates) if j != i for name in other}
        same_kind = [j for j, kind in enumerate(kinds) if kind == kinds[i]]
        number = f" {same_kind.index(i) + 1}" if len(same_kind) > 1 else ""
        names.append(next((name for name in own if name not in others), f"{kinds[i]}{number}"))
    return names


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
    for scope in _scopes():
        for owner, value in scope.items():
            for name, held in [(owner, value), *_attributes(value).items()]:
                if isinstance(held, nn.Module) and id(held) not in known:
                    own = {id(parameter): each for each, parameter in held.named_parameters()}
                    known[id(held)] = name, {key: own[key] for key in own if key in missing}
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
        names |= {each: prefix + _unwrapped(own[each]) for each in covered}
        missing = missing - covered
    return names


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


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


def _places(name: str, value: object, optimizer: Optimizer) -> Iterator[str]:
    """The position of the optimizer in a list or a dictionary."""
    if isinstance(value, (list, tuple)) and len(value) <= _MOST_ITEMS:
        yield from (f"{name}[{i}]" for i, item in enumerate(value) if item is optimizer)
    if isinstance(value, dict) and len(value) <= _MOST_ITEMS:
        yield from (f"{name}[{key!r}]" for key, item in list(value.items()) if item is optimizer)
