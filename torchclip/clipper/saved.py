"""The state of a Clipper as plain data, in a form that every way of saving preserves.

``torch.distributed.checkpoint`` loads only the keys that the new state has, and stores what several ranks
have under the same key only once.  So all keys exist from the start, data of variable length is one value,
and data that differs between ranks has a key of its own on each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from torchclip._core import arguments
from torchclip._core.ranks import meshes
from torchclip.clipper.names import Names
from torchclip.clipper.optimizers import groups_of, parameters_of
from torchclip.clipper.settings import Scope, Settings
from torchclip.thresholds.bank import ThresholdBank

_OF_PARAMETERS, _OF_RANK = "of parameters ", "of rank "


class _Kind(NamedTuple):
    """What a Clipper and the state that it loads must have in common; the same on all ranks."""

    norm_type: float
    scope: Scope
    optimizers: int


class _Loaded(NamedTuple):
    """The parts of a state that may be loaded."""

    steps: int
    thresholds: dict[str, Any]
    spikes: Mapping[str, Any]
    history: Mapping[str, Any]


def collected(settings: Settings, own: dict[str, Any], key: str | None) -> dict[str, Any]:
    """The state.

    Args:
        settings: the Clipper's, of which a part is the same on all ranks.
        own: what may differ between ranks.
        key: the key for that; None if it does not differ.
    """
    kind = _kind_of(settings)._asdict()
    if settings.groups is None:
        return {**kind, **own} if key is None else {**kind, key: own}
    # The ranks of a group differ only in the norms of single parameters.
    if key is None or not settings.layers_every:
        return {**kind, **own}
    history = dict(own["history"])
    return {**kind, **own, "history": history, key: {"layers": history.pop("layers")}}


def checked(state: Mapping[str, Any], settings: Settings, key: str | None, sets: Sequence[str]) -> _Loaded:
    """The parts of a state, or an error that says why a Clipper cannot load it; nothing changes.

    Args:
        state: the saved state.
        settings: those of the Clipper.
        key: the Clipper's key for what may differ between ranks.
        sets: the names of all its sets.
    """
    kind, bank, spikes = _kind_of(settings), settings.bank, settings.spikes
    arguments.saved("state", state, (), "Clipper")
    own = _own_part(state, key)
    arguments.saved("state", own, ("steps",), "Clipper")
    arguments.saved("state", state, ("norm_type", "scope"), "Clipper")
    arguments.saved("state", own, ("thresholds", "history"), "Clipper")
    steps = arguments.count("state['steps']", own["steps"], least=0)
    saved_kind = _checked_kind(state, kind)
    thresholds = _learned("state['thresholds']", own["thresholds"])
    names = arguments.items("state['sets']", own.get("sets", ()), arguments.string)  # 0.1.0 has none
    of_sets = dict.fromkeys([*names, *thresholds])
    if of_sets and saved_kind != kind:
        raise _of_other_norms(saved_kind, kind)
    bank.check(thresholds if bank.learns else of_sets)
    _refuse_foreign("state['thresholds']", of_sets, sets)
    of_spikes = own.get("spikes")  # the first versions did not save it
    if spikes is None or of_spikes is None:
        of_spikes = {"skips": 0, "thresholds": {}}
    else:
        spikes.check(of_spikes)
        if of_spikes["thresholds"] and saved_kind.norm_type != kind.norm_type:
            raise _of_other_norms(saved_kind, kind)
        spikes.bank.check(of_spikes["thresholds"])
        _refuse_foreign("state['spikes']['thresholds']", of_spikes["thresholds"], ["all"])
    arguments.saved("state['history']", own["history"], (), "Clipper")
    layers = state.get(str(key), {}).get("layers") if own is state else None
    history = own["history"] if layers is None else {**own["history"], "layers": layers}
    return _Loaded(steps, thresholds, of_spikes, history)


def _kind_of(settings: Settings) -> _Kind:
    return _Kind(settings.order, settings.scope, settings.count)


def _checked_kind(state: Mapping[str, Any], kind: _Kind) -> _Kind:
    """The kind of a state, which must have as many optimizers as another one."""
    order = arguments.number("state['norm_type']", state["norm_type"])
    scope = arguments.option("state['scope']", state["scope"], get_args(Scope))
    optimizers = arguments.count("state['optimizers']", state.get("optimizers", 1), least=1)
    if optimizers != kind.optimizers:
        raise ValueError(
            f"`state` is that of a Clipper of {optimizers} optimizer{'s' * (optimizers > 1)}, this one "
            f"has {kind.optimizers}; make it for as many, in the same order"
        )
    return _Kind(order, scope, optimizers)


def _of_other_norms(saved_kind: _Kind, kind: _Kind) -> ValueError:
    return ValueError(
        "the thresholds in `state` have learned from norms of (scope, norm_type) = "
        f"{(saved_kind.scope, saved_kind.norm_type)}, but this clipper's are {(kind.scope, kind.norm_type)}; "
        "make it with the same ones"
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
    if names.is_replicated or (parameters and all(map(_on_all_ranks, parameters))):
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


def of_bank(bank: ThresholdBank, in_round: bool) -> dict[str, Any]:
    """What thresholds have learned, by the names of the sets; a user's own object is stored as one value."""
    states = bank.state_dict(in_round)
    return {name: (state,) for name, state in states.items()} if bank.runs_user_code else states


def _learned(name: str, saved: Any) -> dict[str, Any]:
    """The result of ``of_bank``, for the ``load_state_dict`` of a bank; ``name`` is for errors."""
    arguments.saved(name, saved, (), "Clipper")
    return {
        key: state[0] if isinstance(state, (tuple, list)) and len(state) == 1 else state
        for key, state in saved.items()
    }


def _refuse_foreign(argument: str, names: Iterable[str], own: Sequence[str]) -> None:
    """Raise an error for what was learned for sets that this Clipper does not have."""
    foreign = [name for name in names if name not in set(own)]
    if foreign:
        raise ValueError(
            f"`{argument}` has {', '.join(map(repr, foreign))}, which this Clipper does not clip; it clips "
            f"{', '.join(map(repr, own)) or 'nothing'}. Make it for the same parameter groups, with the same "
            "`scope` and `model`"
        )
