"""The state of a Clipper as plain data, in a form that every way of saving preserves.

``torch.distributed.checkpoint`` loads only the keys that the new state has, and stores what several ranks
have under the same key only once.  So all keys exist from the start, data of variable length is one value,
and data that differs between ranks has a key of its own on each.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

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


# What a Clipper and the state that it loads have in common; the same on all ranks.
_KIND: dict[str, tuple[type, ...]] = {
    "norm_type": (float, int),
    "scope": (str,),
    "optimizers": (int,),
    "max_norm": (str,),
}
_OWN: dict[str, tuple[type, ...]] = {
    "steps": (int,),
    "sets": (list, tuple),
    "thresholds": (Mapping,),
    **dict.fromkeys(_LIMITS, (Mapping, type(None))),
    "skips": (Mapping,),
    "history": (Mapping,),
}
_SKIPS: dict[str, tuple[type, ...]] = dict.fromkeys(("nonfinite", *_LIMITS), (int,))


def state_of(settings: Settings, rounds: Rounds, key: str | None) -> dict[str, Any]:
    """The state; during a step that of before it.  The caller holds the lock.

    Args:
        settings: the Clipper's, of which a part is the same on all ranks.
        rounds: its rounds.
        key: the key for what differs between ranks; None if nothing does.
    """
    kind = _kind_of(settings)
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


def load(
    state: Mapping[str, Any], settings: Settings, rounds: Rounds, key: str | None, sets: Sequence[str]
) -> None:
    """Continue from a state, or raise an error before anything changes.  The caller holds the lock.

    Args:
        state: the saved state.
        settings: those of the Clipper.
        rounds: its rounds.
        key: its key for what may differ between ranks.
        sets: the names of all its sets.
    """
    own, history = _checked(state, settings, key, sets)
    rounds.history.load_state_dict(history)  # also refuses a wrong history before anything changes
    rounds.forget()
    rounds.number = own["steps"]
    settings.bank.load_state_dict(_learned(own["thresholds"]))
    settings.nonfinite_skips.load(own["skips"]["nonfinite"])
    for limit in settings.limits:
        limit.bank.load_state_dict(_learned(own[limit.argument]))
        limit.skips.load(own["skips"][limit.argument])


def _checked(
    state: Mapping[str, Any], settings: Settings, key: str | None, sets: Sequence[str]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The part of a state that a Clipper loads, and the history, or an error that says why it cannot."""
    arguments.saved("state", state, (), "Clipper")
    own = _own_part(state, key)
    _check_fields("state", own, _OWN)
    _check_fields("state", state, _KIND)
    arguments.option("state['scope']", state["scope"], get_args(Scope))
    _check_fields("state['skips']", own["skips"], _SKIPS)
    if state["optimizers"] != settings.names.count:
        raise ValueError(
            f"`state` is that of a Clipper of {state['optimizers']} optimizer(s), this one has "
            f"{settings.names.count}; make it for as many, in the same order"
        )
    thresholds = _learned(own["thresholds"])
    names = [*own["sets"], *thresholds]
    _check_sets("state['thresholds']", names, sets)
    settings.bank.check(thresholds if settings.bank.learns else dict.fromkeys(names))
    _check_limits(own, settings)
    _compare(state, _kind_of(settings), bool(names or own["skip_above"]))
    layers = state.get(str(key), {}).get("layers") if own is state else None
    return own, own["history"] if layers is None else {**own["history"], "layers": layers}


def _check_fields(name: str, part: Any, fields: Mapping[str, tuple[type, ...]]) -> None:
    """Raise an error if a part of a state lacks a field, or has one of another type."""
    arguments.saved(name, part, fields, "Clipper")
    for key, types in fields.items():
        if not isinstance(part[key], types):
            raise TypeError(
                f"`{name}[{key!r}]` must be of type {types[0].__name__}, got {arguments.shown(part[key])}; "
                "pass what Clipper.state_dict() returned"
            )
        if types == (int,):
            arguments.count(f"{name}[{key!r}]", part[key], least=0)


def _check_limits(own: Mapping[str, Any], settings: Settings) -> None:
    """Raise an error unless the limits of a Clipper can load what those of a state have learned."""
    limits = {limit.argument: limit for limit in settings.limits}
    for name in _LIMITS:
        learned = _learned(own[name])
        if name in limits:
            _check_sets(f"state[{name!r}]", learned, ["all"])
            limits[name].bank.check(learned)
        elif learned:
            raise ValueError(
                f"`state` holds what a `{name}` has learned, but this clipper has none; make it with one"
            )


def _kind_of(settings: Settings) -> dict[str, Any]:
    is_number = isinstance(settings.max_norm, float)
    max_norm = "a number" if is_number else type(settings.max_norm).__name__
    values = settings.norm_type, settings.scope, settings.names.count, max_norm
    return dict(zip(_KIND, values, strict=True))


def _compare(state: Mapping[str, Any], own: Mapping[str, Any], has_learned: bool) -> None:
    """Compare how two Clippers clip: what was learned must fit; else a warning names the differences."""
    differences = [
        f"`{name}` was {state[name]!r} and is {now!r}" for name, now in own.items() if state[name] != now
    ]
    if not differences:
        return
    before, now = ((kind["scope"], kind["norm_type"]) for kind in (state, own))
    if has_learned and before != now:
        raise ValueError(
            f"the thresholds in `state` have learned from norms of (scope, norm_type) = {before}, but this "
            f"clipper's are {now}; make it with the same ones"
        )
    warnings.warn(
        f"`state` was saved by a Clipper with other settings: {', '.join(differences)}. It was loaded, but "
        "thresholds that `state` lacks start without what they would have learned",
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
    part: Mapping[str, Any] = state[chosen]
    arguments.saved(f"state[{chosen!r}]", part, (), "Clipper")
    return part


def _of_bank(bank: ThresholdBank, ended: bool) -> dict[str, Any]:
    """What thresholds have learned, by the names of the sets; a user's own object is stored as one value."""
    states = bank.state_dict(ended)
    return states if bank.is_ours else {name: (state,) for name, state in states.items()}


def _learned(saved: Mapping[str, Any] | None) -> dict[str, Any]:
    """The result of ``_of_bank``, for the ``load_state_dict`` of a bank; a limit may have saved none."""
    return {
        key: state[0] if isinstance(state, (tuple, list)) and len(state) == 1 else state
        for key, state in (saved or {}).items()
    }


def _check_sets(argument: str, names: Iterable[Any], own: Sequence[str]) -> None:
    """Raise an error for what was learned for sets that this Clipper does not have."""
    foreign = [name for name in names if name not in own]
    if foreign:
        raise ValueError(
            f"`{argument}` has {', '.join(map(repr, foreign))}, which this Clipper does not clip; it clips "
            f"{', '.join(map(repr, own)) or 'nothing'}. Make it for the same parameter groups, with the same "
            "`scope` and `model`"
        )
