"""A fused step that applies the clip coefficient, and the cases in which it cannot."""

import copy
from typing import Any

import pytest
import torch
from clipper_helpers import FUSED, Net, fused_or_not, gradients, sgd, train
from helpers import last_of, randn, with_gradients
from torch import nn

import torchclip
from torchclip import Clipper, kernel
from torchclip._core import native
from torchclip.clipper.scope import Snapshot

pytestmark = pytest.mark.usefixtures("kernel_on_and_off", "one_thread", "small_ones_too")

each_fused = pytest.mark.parametrize("name", FUSED)


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


@each_fused
def test_a_fused_step_takes_the_coefficient_along_and_no_other_pass(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1, fused=True)
    if not hasattr(optimizer, "_step_supports_amp_scaling"):
        pytest.skip("does not take a grad_scale in this version of torch (Adagrad, in 2.10)")
    clipper = Clipper(optimizer, 0.5)

    def refuse(*_: object) -> None:
        raise AssertionError("the gradients were scaled in a pass of their own")

    monkeypatch.setattr("torchclip.clipper.scope.Snapshot.scale_", refuse)
    train(model, optimizer, range(2))
    assert clipper.history.summary().clipped == 2
    assert float(torchclip.get_total_norm(gradients(optimizer))) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("size", [3, 600_000])
def test_small_gradients_are_scaled_in_place_by_the_kernel(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(native, "step_state", lambda *_: None)
    optimizer = sgd([torch.ones(size)], fused=True)
    scaled: list[Any] = []
    scale_ = Snapshot.scale_

    def note(one: Any) -> None:
        scaled.append(one)
        scale_(one)

    monkeypatch.setattr("torchclip.clipper.scope.Snapshot.scale_", note)
    Clipper(optimizer, 1.0)
    optimizer.step()
    in_place = size == 3 and kernel.status().startswith("active")
    assert len(scaled) == int(in_place)
    # For so many elements, torch's own norm has a larger error than this.
    assert float(torchclip.get_total_norm(gradients(optimizer))) == pytest.approx(1.0, rel=1e-4)


@fused_or_not
@pytest.mark.parametrize("max_norm", [0.0, 1e-30])
def test_coefficients_beyond_float32(max_norm: float, fused: bool) -> None:
    optimizer = sgd([torch.tensor([3e8, 4e8])], fused=fused)
    clipper = Clipper(optimizer, max_norm)
    optimizer.step()
    assert last_of(clipper).clip_coef == pytest.approx(max_norm / 5e8)
    expected = [0.6 * max_norm, 0.8 * max_norm]
    assert gradients(optimizer)[0].tolist() == pytest.approx(expected, rel=1e-5, abs=0)


@fused_or_not
def test_a_subclass_finds_clipped_gradients_in_its_step(fused: bool) -> None:
    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None, noise: float = 1.0) -> Any:
            gradients(self)[0].add_(noise)
            return super().step(closure)

    optimizer = Noisy(with_gradients([torch.tensor([3.0, 4.0])]), lr=1.0, fused=fused)
    Clipper(optimizer, 1.0)
    optimizer.step()
    assert optimizer.param_groups[0]["params"][0].tolist() == pytest.approx([-1.6, -1.8])


def stands_against(**changes: Any) -> str | None:
    """A clipper's record of a step with gradients that must be clipped."""
    options: dict[str, Any] = {
        "kind": torch.optim.SGD,
        "fused": True,
        "grads": [torch.tensor([3.0, 4.0])],
        "clipper": {},
        "then": lambda optimizer: None,
        **changes,
    }
    optimizer = options["kind"](
        with_gradients(copy.deepcopy(options["grads"])), lr=1.0, fused=options["fused"]
    )
    clipper = Clipper(optimizer, 1.0, **options["clipper"])
    options["then"](optimizer)
    optimizer.step()
    return clipper._clipping.not_fused


class Derived(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


SHARED_GRAD = torch.tensor([3.0, 4.0])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"kind": torch.optim.RMSprop, "fused": False}, "grad_scale"),
        ({"then": lambda o: o.param_groups[0].update(fused=False)}, "not fused"),
        ({"kind": Derived}, "step"),
        ({"then": lambda o: o.register_step_pre_hook(lambda *_: None)}, "later hook"),
        ({"then": lambda o: o.add_param_group({"params": [], "max_norm": 1.0})}, "several coefficients"),
        ({"clipper": {"scope": "parameter"}}, "several coefficients"),
        ({"grads": [torch.ones(3, dtype=torch.float64)]}, "float64"),
        ({"grads": [SHARED_GRAD, SHARED_GRAD]}, "several parameters"),
        ({"grads": [torch.ones(4, 4)[:, ::2]]}, "gaps"),
        ({"grads": [torch.full((2,), 1e37)], "clipper": {"norm_type": "inf"}}, "float32's range"),
    ],
)
def test_why_the_coefficient_does_not_go_along_with_the_step(changes: Any, reason: str | None) -> None:
    kind = changes.get("kind", torch.optim.SGD)
    if kind is torch.optim.RMSprop:
        changes = {**changes, "kind": lambda ps, lr, fused: kind(ps, lr=lr)}
    said = stands_against(**changes)
    assert said is None if reason is None else reason in str(said)


def test_few_elements_are_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(native, "step_state", lambda *_: None)
    said = stands_against()
    assert "sooner" in str(said) if kernel.status().startswith("active") else said is None
