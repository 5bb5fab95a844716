"""Every public class and function refuses what an argument cannot be, by its name.

What the functions refuse of their numbers and tensors is in test_arguments.py.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import with_gradients
from torch import nn

import torchclip
from torchclip import Clipper, Percentile, ZScore, reference
from torchclip.reference import Array

MODEL = nn.Linear(2, 1)
WRONG: dict[str, Any] = {
    "None": None,
    "a string": "one",
    "bytes": b"1",
    "nan": math.nan,
    "below 0": -1.0,
    "a list": [1.0],
    "an empty list": [],
    "a dictionary": {},
    "a module": MODEL,
    "a class": nn.Linear,
    "a tensor": torch.ones(2),
    "an array": np.ones(2),
    "a complex number": 1j,
    "a truth value": True,
    "an object": object(),
    "inf": math.inf,
    "a fraction": 1.5,
}
NUMBERS = {"inf", "a fraction"}


MADE: list[Any] = []


def parameters() -> list[Any]:
    MADE[:] = with_gradients([torch.tensor([3.0, 4.0])])
    return MADE


def clipper(*arguments: Any, **options: Any) -> Clipper:
    return Clipper(torch.optim.SGD(parameters(), lr=0.1), *arguments, **options)


def arrays() -> list[Array]:
    return [np.array([3.0, 4.0])]


# Valid arguments, the argument that is tested, and wrong values that are right for it.
ARGUMENTS: dict[str, tuple[Callable[[Any], Any], str, set[str]]] = {
    "clip_grad_norm_": (
        lambda v: torchclip.clip_grad_norm_(parameters(), 1.0, error_if_nonfinite=v),
        "error_if_nonfinite",
        {"a truth value"},
    ),
    "get_total_norm": (
        lambda v: torchclip.get_total_norm([torch.ones(2)], error_if_nonfinite=v),
        "error_if_nonfinite",
        {"a truth value"},
    ),
    "clip_grad_norm_, group": (
        lambda v: torchclip.clip_grad_norm_(parameters(), 1.0, group=v),
        "group",
        {"None", "an empty list"},
    ),
    "get_total_norm, group": (
        lambda v: torchclip.get_total_norm([torch.ones(2)], group=v),
        "group",
        {"None", "an empty list"},
    ),
    "Percentile": (Percentile, "percentile", {"a fraction"}),
    "Percentile, window": (lambda v: Percentile(window=v), "window", {"None"}),
    "Percentile, warmup": (lambda v: Percentile(warmup=v), "warmup", set()),
    "Percentile, max_norm": (lambda v: Percentile(max_norm=v), "max_norm", NUMBERS),
    "Percentile, norm": (lambda v: Percentile().update(v), "norm", {*NUMBERS, "nan"}),
    "Percentile, state": (lambda v: Percentile().load_state_dict(v), "state", set()),
    "ZScore": (ZScore, "alpha", set()),
    "ZScore, threshold": (lambda v: ZScore(threshold=v), "threshold", {"a fraction"}),
    "ZScore, warmup": (lambda v: ZScore(warmup=v), "warmup", set()),
    "ZScore, clip_option": (lambda v: ZScore(clip_option=v), "clip_option", set()),
    "ZScore, skip": (lambda v: ZScore(skip_update_on_spike=v), "skip_update_on_spike", {"a truth value"}),
    "ZScore, max_norm": (lambda v: ZScore(max_norm=v), "max_norm", NUMBERS),
    "ZScore, norm": (lambda v: ZScore().update(v), "norm", {*NUMBERS, "nan"}),
    "ZScore, state": (lambda v: ZScore().load_state_dict(v), "state", set()),
    "Clipper": (lambda v: Clipper(v, 1.0), "optimizer", set()),
    "Clipper, max_norm": (clipper, "max_norm", {*NUMBERS, "a module"}),  # which is callable
    "Clipper, norm_type": (lambda v: clipper(1.0, norm_type=v), "norm_type", {*NUMBERS, "below 0"}),
    "Clipper, scope": (lambda v: clipper(1.0, scope=v), "scope", set()),
    "Clipper, nonfinite": (lambda v: clipper(1.0, nonfinite=v), "nonfinite", set()),
    "Clipper, group": (lambda v: clipper(1.0, group=v), "group", {"None", "an empty list"}),
    "Clipper, on_clip": (lambda v: clipper(1.0, on_clip=v), "on_clip", {"None", "a module", "a class"}),
    "Clipper, state": (lambda v: clipper(1.0).load_state_dict(v), "state", set()),
    "History": (torchclip.history.History, "maxlen", set()),
    "History, state": (lambda v: torchclip.history.History().load_state_dict(v), "state", set()),
    "global_norm": (reference.global_norm, "grads", {"an empty list"}),
    "global_norm, norm_type": (
        lambda v: reference.global_norm(arrays(), v),
        "norm_type",
        {*NUMBERS, "below 0"},
    ),
    "clip_grads": (lambda v: reference.clip_grads(v, 1.0), "grads", {"an empty list"}),
    "clip_grads, max_norm": (lambda v: reference.clip_grads(arrays(), v), "max_norm", NUMBERS),
    "clip_coefficient": (lambda v: reference.clip_coefficient(v, 1.0), "max_norm", NUMBERS),
    "clip_coefficient, total_norm": (
        lambda v: reference.clip_coefficient(1.0, v),
        "total_norm",
        {*NUMBERS, "nan", "below 0"},
    ),
    "clip_grads_with_norm": (
        lambda v: reference.clip_grads_with_norm(arrays(), 1.0, v),
        "total_norm",
        {*NUMBERS, "nan"},
    ),
    "clip_grad_value": (lambda v: reference.clip_grad_value(arrays(), v), "clip_value", NUMBERS),
    "clip_grad_norm_per_parameter": (
        lambda v: reference.clip_grad_norm_per_parameter(arrays(), 1.0, v),
        "norm_type",
        {*NUMBERS, "below 0"},
    ),
    "clip_grad_adaptive": (lambda v: reference.clip_grad_adaptive(v, arrays()), "weights", set()),
    "clip_grad_adaptive, grads": (
        lambda v: reference.clip_grad_adaptive(arrays(), v),
        "grads",
        set(),
    ),
    "clip_grad_adaptive, eps": (
        lambda v: reference.clip_grad_adaptive(arrays(), arrays(), 1.0, v),
        "eps",
        NUMBERS,
    ),
    "clip_per_example": (lambda v: reference.clip_per_example(v, 1.0), "grads", {"an empty list"}),
    "clip_per_example, max_norm": (lambda v: reference.clip_per_example(arrays(), v), "max_norm", NUMBERS),
    "percentile_thresholds": (
        reference.percentile_thresholds,
        "norms",
        {"a list", "an empty list", "an array"},
    ),
    "percentile_thresholds, percentile": (
        lambda v: reference.percentile_thresholds([1.0], v),
        "percentile",
        {"a fraction"},
    ),
    "percentile_thresholds, window": (
        lambda v: reference.percentile_thresholds([1.0], window=v),
        "window",
        {"None"},
    ),
    "percentile_thresholds, warmup": (
        lambda v: reference.percentile_thresholds([1.0], warmup=v),
        "warmup",
        set(),
    ),
    "percentile_thresholds, max_norm": (
        lambda v: reference.percentile_thresholds([1.0], max_norm=v),
        "max_norm",
        NUMBERS,
    ),
    "zscore_thresholds": (reference.zscore_thresholds, "norms", {"a list", "an empty list", "an array"}),
    "zscore_thresholds, alpha": (lambda v: reference.zscore_thresholds([1.0], v), "alpha", set()),
    "zscore_thresholds, threshold": (
        lambda v: reference.zscore_thresholds([1.0], threshold=v),
        "threshold",
        NUMBERS,
    ),
    "zscore_thresholds, warmup": (lambda v: reference.zscore_thresholds([1.0], warmup=v), "warmup", set()),
    "zscore_thresholds, clip_option": (
        lambda v: reference.zscore_thresholds([1.0], clip_option=v),
        "clip_option",
        set(),
    ),
    "zscore_thresholds, max_norm": (
        lambda v: reference.zscore_thresholds([1.0], max_norm=v),
        "max_norm",
        NUMBERS,
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_wrong_value_is_refused_by_the_name_of_its_argument(name: str) -> None:
    call, argument, right = ARGUMENTS[name]
    for kind, value in WRONG.items():
        if kind in right:
            call(value)
            continue
        with pytest.raises((TypeError, ValueError)) as caught:
            call(value)
        assert f"`{argument}` " in str(caught.value), (kind, str(caught.value))
        assert all(p.grad.tolist() == [3.0, 4.0] and p.grad._version == 0 for p in MADE)


def test_install_takes_only_groups_and_uninstall_nothing() -> None:
    group: Any = MODEL
    with pytest.raises(TypeError, match="process group"):
        torchclip.install(group)
    with pytest.raises(TypeError, match="process group"), torchclip.installed(group):
        pass
    uninstall: Callable[..., object] = torchclip.uninstall
    with pytest.raises(TypeError, match="takes 0 positional arguments but 1 was given"):
        uninstall(MODEL)
