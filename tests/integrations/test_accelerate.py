"""A Clipper, and install(), with Accelerate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from frameworks import MAX_NORM, OF_ACCELERATE, assert_same, counted, data
from torch import nn
from torch.nn import functional as F

import torchclip

# The frameworks' warnings depend on their versions and on the machine.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_clipper_from_before_accelerates_prepare() -> None:
    def train(clip: str) -> tuple[nn.Module, torchclip.Clipper | None]:
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        clipper = torchclip.Clipper(optimizer, MAX_NORM) if clip == "clipper" else None
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, data())
        for x, y in loader:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                accelerator.backward(F.mse_loss(model(x), y))
                if clip == "accelerator" and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
        return model, clipper

    (expected, _), (found, clipper) = train("accelerator"), train("clipper")
    assert clipper is not None
    assert clipper.history.summary().clipped == 3
    assert_same(found.state_dict(), expected.state_dict())


def test_accelerate_saves_and_loads_a_clipper(tmp_path: Path) -> None:
    """Training continues from Accelerate's checkpoint as if it had not been interrupted."""

    def prepared() -> tuple[Accelerator, nn.Module, Any, torchclip.Clipper]:
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        clipper = torchclip.Clipper(optimizer, torchclip.Percentile(30.0, warmup=2))
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(clipper)
        return accelerator, model, optimizer, clipper

    def train(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> None:
        for x, y in data():
            optimizer.zero_grad()
            accelerator.backward(F.mse_loss(model(x), y))
            optimizer.step()

    accelerator, whole, optimizer, expected = prepared()
    train(accelerator, whole, optimizer)
    accelerator.save_state(str(tmp_path / "state"))
    train(accelerator, whole, optimizer)
    accelerator, resumed, optimizer, found = prepared()
    accelerator.load_state(str(tmp_path / "state"))
    assert len(found.history) == 6
    train(accelerator, resumed, optimizer)
    assert list(found.history) == list(expected.history)
    assert_same(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_accelerates_wrapper_of_an_optimizer_is_refused() -> None:
    model = nn.Linear(4, 1)
    wrapped = Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"wrapper without hooks .* pass the optimizer that it wraps"):
        torchclip.Clipper(wrapped, MAX_NORM)
    torchclip.Clipper(wrapped.optimizer, MAX_NORM)


def test_accelerate_clips_with_torchclip() -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(nn.Linear(4, 1, bias=False))
    model.weight.grad = torch.full((1, 4), 1e20)
    accelerator.sync_gradients = True
    with counted(*OF_ACCELERATE) as norms:
        assert accelerator.clip_grad_norm_(model.parameters(), 1.0) == 2e20
    assert norms == [2e20]
    torch.testing.assert_close(model.weight.grad, torch.full((1, 4), 0.5))
    with counted("clip_grad_value_") as calls:
        accelerator.clip_grad_value_(model.parameters(), 0.25)
    assert len(calls) == 1
    torch.testing.assert_close(model.weight.grad, torch.full((1, 4), 0.25))
