"""The state of a Clipper as plain data, in a form that every way of saving preserves.

``torch.distributed.checkpoint`` loads only the keys that the new state has, and stores what several ranks
have under the same key only once.  So all keys exist from the start, data of variable length is one value,
and data that differs between ranks has a key of its own on each.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from torchclip._core import arguments
from torchclip._core.ranks import meshes
from torchclip.clipper.names import Names
from torchclip.clipper.optimizers import groups_of, parameters_of
from torchclip.clipper.rounds import Rounds
from torchclip.clipper.settings import Scope, Settings
from torchclip.thresholds.bank import ThresholdBank

_LIMITS = ("skip_above", "skip_loss_above")
_OF_PARAMETERS, _OF_RANK = "of parameters ", "of rank "


class _Kind(NamedTuple):
    """What a Clipper and the state that it loads have in common; the same on all ranks."""

    norm_type: float
    scope: Scope
    optimizers: int
    max_norm: str


class Loaded(NamedTuple):
    """The parts of a state that may be loaded."""

    steps: int
    thresholds: dict[str, Any]
    limits: Mapping[str, dict[str, Any]]
    skips: Mapping[str, int]
    history: Mapping[str, Any]


def state_of(settings: Settings, rounds: Rounds, key: str | None) -> dict[str, Any]:
    """The state; during a step that of before it.  The caller holds the lock.

    Args:
        settings: the Clipper's, of which a part is the same on all ranks.
        rounds: its rounds.
        key: the key for what differs between ranks; None if nothing does.
    """
    kind = _kind_of(settings)._asdict()
    ended = not rounds.is_within()
    thresholds = _of_bank(settings.bank, ended)
    history = rounds.history.state_dict()
    own: dict[str, Any] = {
        "steps": rounds.steps(),
        "sets": list(thresholds),
        "thresholds": thresholds,
        **dict.fromkeys(_LIMITS),
        **{limit.argument: _of_bank(limit.bank, ended) for limit in settings.limits},
        "skips": {
            "nonfinite": rounds.skips(settings.nonfinite_skips),
            **dict.fromkeys(_LIMITS, 0),
            **{limit.argument: rounds.skips(limit.skips) for limit in settings.limits},
        },
        "history": history,
    }
    if settings.groups is None:
        return {**kind, **own} if key is None else {**kind, key: own}
    # The ranks of a group differ only in the norms of single parameters.
    if key is None or not settings.layers_every:
        return {**kind, **own}
    return {**kind, **own, key: {"layers": history.pop("layers")}}


def checked(state: Mapping[str, Any], settings: Settings, key: str | None, sets: Sequence[str]) -> Loaded:
    """The parts of a state, or an error that says why a Clipper cannot load it; nothing changes.

    Args:
        state: the saved state.
        settings: those of the Clipper.
        key: the Clipper's key for what may differ between ranks.
        sets: the names of all its sets.
    """
    arguments.saved("state", state, (), "Clipper")
    own = _own_part(state, key)
    arguments.saved("state", own, ("steps",), "Clipper")
    arguments.saved("state", state, _Kind._fields, "Clipper")
    arguments.saved("state", own, ("sets", "thresholds", *_LIMITS, "skips", "history"), "Clipper")
    saved_kind = _checked_kind(state, settings)
    thresholds = _learned("state['thresholds']", own["thresholds"])
    names = arguments.items("state['sets']", own["sets"], arguments.string)
    of_sets = dict.fromkeys([*names, *thresholds])
    settings.bank.check(thresholds if settings.bank.learns else of_sets)
    _check_sets("state['thresholds']", of_sets, sets)
    limits = {name: _checked_limit(name, own[name], settings) for name in _LIMITS}
    _compare(saved_kind, _kind_of(settings), bool(of_sets or limits["skip_above"]))
    arguments.saved("state['skips']", own["skips"], ("nonfinite", *_LIMITS), "Clipper")
    skips = {
        name: arguments.count(f"state['skips'][{name!r}]", own["skips"][name], least=0)
        for name in ("nonfinite", *_LIMITS)
    }
    arguments.saved("state['history']", own["history"], (), "Clipper")
    layers = state.get(str(key), {}).get("layers") if own is state else None
    history = own["history"] if layers is None else {**own["history"], "layers": layers}
    steps = arguments.count("state['steps']", own["steps"], least=0)
    return Loaded(steps, thresholds, limits, skips, history)


def _checked_limit(name: str, saved: Any, settings: Settings) -> dict[str, Any]:
    """What a limit above which steps are skipped has learned; None from a Clipper without one."""
    learned = _learned(f"state[{name!r}]", {} if saved is None else saved)
    limit = next((limit for limit in settings.limits if limit.argument == name), None)
    if limit is not None:
        limit.bank.check(learned)
        _check_sets(f"state[{name!r}]", learned, ["all"])
    elif learned:
        raise ValueError(
            f"`state` holds what a `{name}` has learned, but this clipper has none; make it with the same one"
        )
    return learned


def load(loaded: Loaded, settings: Settings, rounds: Rounds) -> None:
    """Continue from the parts of a state.  The caller holds the lock."""
    rounds.history.load_state_dict(loaded.history)  # refuses a wrong state before anything changes
    rounds.forget()
    rounds.number = loaded.steps
    settings.bank.load_state_dict(loaded.thresholds)
    settings.nonfinite_skips.load(loaded.skips["nonfinite"])
    for limit in settings.limits:
        limit.bank.load_state_dict(loaded.limits[limit.argument])
        limit.skips.load(loaded.skips[limit.argument])


def _kind_of(settings: Settings) -> _Kind:
    given = settings.rule or settings.bank.given
    max_norm = "a number" if settings.bank.number is not None and not settings.rule else type(given).__name__
    return _Kind(settings.norm_type, settings.scope, settings.names.count, max_norm)


def _checked_kind(state: Mapping[str, Any], settings: Settings) -> _Kind:
    """The kind of a state, which must have as many optimizers as the Clipper."""
    norm_type = arguments.number("state['norm_type']", state["norm_type"])
    scope = arguments.option("state['scope']", state["scope"], get_args(Scope))
    optimizers = arguments.count("state['optimizers']", state["optimizers"], least=1)
    max_norm = arguments.string("state['max_norm']", state["max_norm"])
    if optimizers != settings.names.count:
        raise ValueError(
            f"`state` is that of a Clipper of {optimizers} optimizer{'s' * (optimizers > 1)}, this one "
            f"has {settings.names.count}; make it for as many, in the same order"
        )
    return _Kind(norm_type, scope, optimizers, max_norm)


def _compare(saved: _Kind, own: _Kind, has_learned: bool) -> None:
    """Compare how two Clippers clip: what was learned must fit; else a warning names the differences."""
    differences = [
        f"`{name}` was {before!r} and is {now!r}"
        for name, before, now in zip(_Kind._fields, saved, own, strict=True)
        if before != now
    ]
    if not differences:
        return
    norms = (saved.scope, saved.norm_type), (own.scope, own.norm_type)
    if has_learned and norms[0] != norms[1]:
        raise ValueError(
            f"the thresholds in `state` have learned from norms of (scope, norm_type) = {norms[0]}, but this "
            f"clipper's are {norms[1]}; make it with the same ones"
        )
    warnings.warn(
        f"`state` is that of a Clipper which clips otherwise: {', '.join(differences)}. It was loaded; what "
        "this Clipper learns starts anew, unless `state` has it",
        stacklevel=arguments.level_of_caller(),
    )


def owner(optimizers: Sequence[Optimizer], names: Names) -> str | None:
    """The key for this rank's own data; None if all ranks have the same.

    For a Clipper with a `group` this is the norms of single parameters, as it knows all other norms jointly.

    All ranks have the same if torch replicates the model, or shards every parameter over all ranks.
    Otherwise they may be stages of a pipeline, which differ by the names of parameters if the Clipper knows
    these, else by rank.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    parameters = parameters_of(*optimizers)
    if names.replicas or (parameters and all(map(_on_all_ranks, parameters))):
        return None
    known = dict(names.named_parameters(optimizers))
    places = {
        f"{group.place('params')}[{i}]"
        for group in groups_of(optimizers)
        for i in range(len(group.parameters))
    }
    if known and not places & known.keys():
        digest = hashlib.sha256("\n".join(sorted(known)).encode()).hexdigest()
        return f"{_OF_PARAMETERS}{digest[:16]}"
    return f"{_OF_RANK}{dist.get_rank()}"


def _on_all_ranks(parameter: Tensor) -> bool:
    return meshes.is_dtensor(parameter) and bool(parameter.device_mesh.size() == dist.get_world_size())


def _own_part(state: Mapping[str, Any], key: str | None) -> Mapping[str, Any]:
    """The part of a state that this rank loads.

    Raises:
        ValueError: if the state belongs to other parameters, or has several parts but not this one.
    """
    parts = [other for other in state if str(other).startswith((_OF_PARAMETERS, _OF_RANK))]
    if not parts or "steps" in state:
        return state
    if key in parts:
        chosen = key
    elif len(parts) > 1 or (parts[0].startswith(_OF_PARAMETERS) and str(key).startswith(_OF_PARAMETERS)):
        raise ValueError(
            f"`state` holds what Clippers of other parameters or ranks have learned ("
            f"{', '.join(parts)}), this one is {key or 'of all ranks'}; load the state "
            "that a Clipper of the same parameters has saved"
        )
    else:
        chosen = parts[0]
    part = state[chosen]
    if not isinstance(part, Mapping):
        raise TypeError(f"`state[{chosen!r}]` must be a dictionary, got {arguments.shown(part)}")
    return part


def _of_bank(bank: ThresholdBank, ended: bool) -> dict[str, Any]:
    """What thresholds have learned, by the names of the sets; a user's own object is stored as one value."""
    states = bank.state_dict(ended)
    return states if bank.is_ours else {name: (state,) for name, state in states.items()}


def _learned(name: str, saved: Any) -> dict[str, Any]:
    """The result of ``_of_bank``, for the ``load_state_dict`` of a bank; ``name`` is for errors."""
    arguments.saved(name, saved, (), "Clipper")
    return {
        key: state[0] if isinstance(state, (tuple, list)) and len(state) == 1 else state
        for key, state in saved.items()
    }


def _check_sets(argument: str, names: Iterable[str], own: Sequence[str]) -> None:
    """Raise an error for what was learned for sets that this Clipper does not have."""
    foreign = [name for name in names if name not in set(own)]
    if foreign:
        raise ValueError(
            f"`{argument}` has {', '.join(map(repr, foreign))}, which this Clipper does not clip; it clips "
            f"{', '.join(map(repr, own)) or 'nothing'}. Make it for the same parameter groups, with the same "
            "`scope` and `model`"
        )
