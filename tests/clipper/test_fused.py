"""A fused step that applies the clip coefficient, and the cases in which it cannot."""

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from clipper_helpers import FUSED, gradients
from helpers import randn, with_gradients
from torch import Tensor, nn
from torch.optim import SGD

import torchclip
from torchclip import Clipper, kernel

pytestmark = pytest.mark.usefixtures("kernel_on_and_off", "small_ones_too")

FUSED_OPTIONS = [
    *(
        ("Adam", {"lr": 0.05, **o})
        for o in ({}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.1})
    ),
    *(("AdamW", {"lr": 0.05, **o}) for o in ({}, {"amsgrad": True}, {"maximize": True})),
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    ("Adagrad", {"lr": 0.1}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "maximize": True}),
]


def test_every_fused_optimizer_is_here() -> None:
    assert {name for name, _ in FUSED_OPTIONS} == set(FUSED)


# All options with the usual dtype; the other dtypes with the first options of each optimizer.
FUSED_CASES = [
    pytest.param(name, options, dtype, fused_too, id=f"{name}-{i}-{dtype}-{fused_too}")
    for i, (name, options) in enumerate(FUSED_OPTIONS)
    for dtype, fused_too in [
        (torch.float32, False),
        (torch.float32, True),
        (torch.float64, False),
        (torch.bfloat16, True),
        (torch.half, True),
    ]
    if (dtype, fused_too) == (torch.float32, False) or name not in [n for n, _ in FUSED_OPTIONS[:i]]
]


@pytest.mark.parametrize(("name", "options", "dtype", "fused_too"), FUSED_CASES)
def test_after_a_fused_step_all_is_as_after_scaling_in_place(
    name: str, options: dict[str, Any], dtype: torch.dtype, fused_too: bool
) -> None:
    low = dtype in (torch.bfloat16, torch.half)
    if low and name == "SGD":
        pytest.skip("torch's own steps are wrong (pytorch issue 191763)")
    runs = []
    for clips, fused in ((True, True), (False, fused_too)):
        parameters = [nn.Parameter(randn(17, dtype=dtype)), nn.Parameter(randn(3, 5, dtype=dtype, seed=1))]
        optimizer = getattr(torch.optim, name)(parameters, fused=fused, **options)
        if clips:
            clipper = Clipper(optimizer, 0.7)
        for step in range(3):
            for i, parameter in enumerate(parameters):
                parameter.grad = randn(*parameter.shape, dtype=dtype, seed=10 * step + i, scale=3.0)
            if not clips:
                torchclip.clip_grad_norm_(parameters, 0.7)
            optimizer.step()
            assert not hasattr(optimizer, "grad_scale")
        states = [{k: v for k, v in s.items() if v is not None} for s in optimizer.state.values()]
        runs.append(([p.detach() for p in parameters], gradients(optimizer), states))
    assert clipper.history.summary().clipped == 3
    tolerance = 4 * torch.finfo(dtype).eps if low else {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(*runs, rtol=tolerance, atol=tolerance)


class Derived(SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def applies_it(
    kind: Any, grads: Sequence[Tensor], then: Callable[[Any], object] = lambda _: None, **options: Any
) -> bool:
    """Whether a fused step gets the clip coefficient, as its ``grad_scale``."""
    optimizer = kind(with_gradients(grads), lr=1.0, fused=True)
    Clipper(optimizer, 1.0, **options)
    then(optimizer)
    module = sys.modules["torch.optim.sgd" if kind is Derived else kind.__module__]
    name = module.__name__.split(".")[-1]
    own, seen = getattr(module, name), list[Any]()

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("grad_scale"))
        return own(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, watched)
        optimizer.step()
    norms = [torchclip.get_total_norm(g, options.get("norm_type", 2.0)) for g in gradients(optimizer)]
    # For many elements, torch's own norm has a larger error than this.
    assert float(max(norms)) <= 1.0 + 1e-4
    return seen[0] is not None


class OwnParameter(nn.Parameter):
    """The kernel does not take it, but would take its gradient."""


def with_own_parameters(optimizer: Any) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.__class__ = OwnParameter


USUAL, SHARED = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])


@pytest.mark.parametrize(
    ("kind", "grads", "options", "expected"),
    [
        (SGD, [USUAL], {}, True),
        (torch.optim.Adam, [USUAL, USUAL[:1]], {}, True),
        (Derived, [USUAL], {}, False),  # its own step may look at the gradients
        (SGD, [USUAL], {"then": lambda o: o.param_groups[0].update(fused=False)}, False),
        (SGD, [USUAL], {"then": lambda o: o.register_step_pre_hook(lambda *_: None)}, False),
        (SGD, [USUAL], {"then": lambda o: o.add_param_group({"params": [], "max_norm": 1.0})}, False),
        (SGD, [USUAL], {"scope": "parameter"}, False),
        (SGD, [USUAL.double()], {}, False),
        (SGD, [USUAL], {"then": with_own_parameters}, True),
        (SGD, [SHARED, SHARED], {}, False),  # it would be divided twice
        (SGD, [SHARED, SHARED], {"then": with_own_parameters}, False),
        (SGD, [torch.ones(4, 4)[:, ::2]], {}, False),  # torch writes into the gaps
        (
            SGD,
            [torch.full((2,), 1e37)],
            {"norm_type": "inf"},
            False,
        ),  # the quotient is beyond float32's range
    ],
)
def test_whether_the_step_applies_the_coefficient(
    kind: Any, grads: Sequence[Tensor], options: dict[str, Any], expected: bool
) -> None:
    assert applies_it(kind, copy.deepcopy(grads), **options) == expected


@pytest.mark.parametrize("size", [3, 600_000])
def test_small_gradients_are_scaled_in_place_by_the_kernel(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    in_place = size == 3 and kernel.status().startswith("active")
    assert applies_it(SGD, [torch.ones(size)]) == (not in_place)
