"""Every public class and function refuses what an argument cannot be, by its name.

What the functions refuse of their numbers and tensors is in test_arguments.py, and what the NumPy twins
refuse of theirs in test_reference.py.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import with_gradients
from torch import nn

import torchclip
from torchclip import AdaGC, Clipper, Percentile, RollingSigma, ZScore, reference
from torchclip.history import History
from torchclip.reference import Array

MODEL = nn.Linear(2, 1)
WRONG: dict[str, Any] = {
    "None": None,
    "a string": "one",
    "bytes": b"1",
    "nan": math.nan,
    "below 0": dist.GroupMember.NON_GROUP_MEMBER,  # what stands for a group without this rank: -100
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


def measure(**options: Any) -> object:
    return torchclip.get_total_norm([torch.ones(2)], **options)


def clip(**options: Any) -> object:
    return torchclip.clip_grad_norm_(parameters(), 1.0, **options)


def adaptive_twin(eps: Any = 1e-3, weights: Any = None) -> None:
    reference.clip_grad_adaptive(arrays() if weights is None else weights, arrays(), 1.0, eps)


# What takes the argument, the argument, and wrong values that are right for it.
ARGUMENTS: list[tuple[Callable[..., object], str, set[str]]] = [
    (clip, "error_if_nonfinite", {"a truth value"}),
    (clip, "group", {"None", "an empty list"}),
    (measure, "error_if_nonfinite", {"a truth value"}),
    (measure, "group", {"None", "an empty list"}),
    (torchclip.BlockRMS, "max_rms", NUMBERS),
    (torchclip.Value, "clip_value", NUMBERS),
    (torchclip.Adaptive, "clip_factor", NUMBERS),
    (torchclip.Adaptive, "eps", NUMBERS),
    (Percentile().update, "norm", {*NUMBERS, "nan"}),
    (Percentile().load_state_dict, "state", set()),
    (ZScore, "skip_update_on_spike", {"a truth value"}),
    (ZScore().update, "norm", {*NUMBERS, "nan"}),
    (AdaGC().update, "norm", {*NUMBERS, "nan"}),
    (RollingSigma().update, "norm", {*NUMBERS, "nan"}),
    (ZScore().load_state_dict, "state", set()),
    (partial(Clipper, max_norm=1.0), "optimizer", set()),
    (clipper, "max_norm", {*NUMBERS, "a module"}),  # which is callable
    (partial(clipper, 1.0), "norm_type", {*NUMBERS, "below 0"}),
    (partial(clipper, 1.0), "scope", set()),
    (partial(clipper, 1.0), "nonfinite", set()),
    (partial(clipper, 1.0), "group", {"None", "an empty list"}),
    (partial(clipper, 1.0), "on_clip", {"None", "a module", "a class"}),
    (lambda state: clipper(1.0).load_state_dict(state), "state", set()),
    (History, "maxlen", set()),
    (History().load_state_dict, "state", set()),
    (partial(reference.clip_coefficient, total_norm=1.0), "max_norm", NUMBERS),
    (partial(reference.clip_coefficient, 1.0), "total_norm", {*NUMBERS, "nan", "below 0"}),
    (adaptive_twin, "eps", NUMBERS),
    (adaptive_twin, "weights", {"None"}),
    (reference.percentile_thresholds, "norms", {"a list", "an empty list", "an array"}),
    (partial(reference.percentile_thresholds, [1.0]), "percentile", {"a fraction"}),
    (partial(reference.percentile_thresholds, [1.0]), "window", {"None"}),
    (partial(reference.percentile_thresholds, [1.0]), "warmup", set()),
    (partial(reference.percentile_thresholds, [1.0]), "max_norm", NUMBERS),
    (reference.zscore_thresholds, "norms", {"a list", "an empty list", "an array"}),
    (partial(reference.zscore_thresholds, [1.0]), "alpha", set()),
    (partial(reference.zscore_thresholds, [1.0]), "threshold", NUMBERS),
    (partial(reference.zscore_thresholds, [1.0]), "warmup", set()),
    (partial(reference.zscore_thresholds, [1.0]), "clip_option", set()),
    (partial(reference.zscore_thresholds, [1.0]), "max_norm", NUMBERS),
]


@pytest.mark.parametrize(("call", "argument", "right"), ARGUMENTS)
def test_every_wrong_value_is_refused_by_the_name_of_its_argument(
    call: Callable[..., object], argument: str, right: set[str]
) -> None:
    for kind, value in WRONG.items():
        if kind in right:
            call(**{argument: value})
            continue
        with pytest.raises((TypeError, ValueError)) as caught:
            call(**{argument: value})
        assert f"`{argument}` " in str(caught.value), (kind, str(caught.value))
        assert all(p.grad.tolist() == [3.0, 4.0] and p.grad._version == 0 for p in MADE)
