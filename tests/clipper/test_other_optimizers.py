"""Optimizers of other packages with a Clipper; each is skipped where its package is not installed.

``docs/optimizers.md`` has the versions with which these tests have passed.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import last_of
from torch import nn

import torchclip
from torchclip import Clipper

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def heavyball(model: nn.Module) -> Any:
    """Its steps take the gradients away from the parameters."""
    package = pytest.importorskip("heavyball")
    return package.AdamW(model.parameters(), lr=1e-3, consume_grad=True)


def schedule_free(model: nn.Module) -> Any:
    """Its steps write over the gradients."""
    optimizer = pytest.importorskip("schedulefree").AdamWScheduleFree(model.parameters(), lr=1e-3)
    optimizer.train()
    return optimizer


def galore(model: nn.Module) -> Any:
    """It projects gradients to a few dimensions."""
    group = {"rank": 4, "update_proj_gap": 2, "scale": 0.25, "proj_type": "std"}
    package = pytest.importorskip("galore_torch")
    return package.GaLoreAdamW([{"params": list(model.parameters()), **group}], lr=1e-3)


def bitsandbytes(model: nn.Module) -> Any:
    """Its state has 8 bits an element, in tensors of its own."""
    package = pytest.importorskip("bitsandbytes")
    return package.optim.AdamW8bit(model.parameters(), lr=1e-3, min_8bit_size=16)


def torchao(model: nn.Module) -> Any:
    """Its state are tensor subclasses."""
    return pytest.importorskip("torchao.optim").AdamW8bit(model.parameters(), lr=1e-3)


def muon(model: nn.Module) -> Any:
    if not hasattr(torch.optim, "Muon"):  # since torch 2.9
        pytest.skip("this torch has no Muon")
    return torch.optim.Muon(model.parameters(), lr=1e-2)


makers = pytest.mark.parametrize("make", [heavyball, schedule_free, galore, bitsandbytes, torchao, muon])


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False))


def batches(count: int, bad: int | None = None) -> Iterator[torch.Tensor]:
    torch.manual_seed(1)
    for number in range(count):
        batch = torch.randn(4, 64)
        yield batch * math.nan if number == bad else batch


def backward(model: nn.Module, batch: torch.Tensor) -> None:
    (model(batch) - 1).square().mean().backward()


@makers
def test_it_steps_as_with_gradients_that_were_clipped_by_hand(make: Callable[[nn.Module], Any]) -> None:
    model, by_hand = model_of(), model_of()
    optimizer, other = make(model), make(by_hand)
    clipper = Clipper(optimizer, 0.01, model=model)
    for batch in batches(5):
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()
        backward(by_hand, batch)
        norm = torchclip.clip_grad_norm_(by_hand.parameters(), 0.01)
        other.step()
        other.zero_grad()
        assert last_of(clipper).total_norm == pytest.approx(float(norm), rel=1e-3)
        assert last_of(clipper).clipped_norm == pytest.approx(0.01, rel=1e-3)
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@makers
def test_a_skipped_step_changes_nothing_and_the_next_ones_go_on(make: Callable[[nn.Module], Any]) -> None:
    model, without = model_of(), model_of()
    optimizer, other = make(model), make(without)
    clipper = Clipper(optimizer, 0.01, model=model, nonfinite="skip")
    Clipper(other, 0.01)
    for number, batch in enumerate(batches(6, bad=3)):
        before = [p.detach().clone() for p in model.parameters()]
        backward(model, batch)
        grads = [p.grad for p in model.parameters()]
        optimizer.step()
        if number == 3:
            assert all(map(torch.equal, before, model.parameters()))
            assert [p.grad for p in model.parameters()] == grads  # given back, as they were hidden
        else:
            # What a step takes away or replaces stays so: nothing is given back that it has used up.
            assert not any(map(torch.equal, before, model.parameters()))
            is_consumed = make is heavyball
            assert [p.grad is None for p in model.parameters()] == [is_consumed] * 2
            backward(without, batch)
            other.step()
            other.zero_grad()
        optimizer.zero_grad()
    assert [record.skipped for record in clipper.history] == [number == 3 for number in range(6)]
    for ours, theirs in zip(model.parameters(), without.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_gradients_that_a_step_consumes_are_measured_by_updates_and_rounds() -> None:
    model = model_of()
    first, second = model[0], model[2]  # type: ignore[index]
    optimizers = [heavyball(first), torch.optim.SGD(second.parameters(), lr=0.1)]
    clipper = Clipper(optimizers, 0.01, model=model, layers_every=1, updates=True)
    for batch in batches(3):
        backward(model, batch)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert len(clipper.history) == 3
    updates = clipper.history.layers.updates
    assert {name: len(each) for name, each in updates.items()} == {"0.weight": 3, "2.weight": 3}
    assert all(each.update > 0 for of_one in updates.values() for each in of_one)
