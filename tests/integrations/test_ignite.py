"""A Clipper with Ignite: on the optimizer of its trainer, and in its checkpoints."""

from pathlib import Path

import pytest
import torch
from frameworks import MAX_NORM, assert_same, data
from ignite.engine import Engine, Events, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver
from torch import nn

import torchclip

# The frameworks' warnings depend on their versions and on the machine.
pytestmark = pytest.mark.filterwarnings("ignore")


class Training:
    """A model, its optimizer and clipper, and Ignite's trainer."""

    def __init__(self, max_norm: float | torchclip.Threshold, accumulate: int = 1) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 1)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.clipper = torchclip.Clipper(self.optimizer, max_norm)
        self.trainer: Engine = create_supervised_trainer(
            self.model, self.optimizer, nn.functional.mse_loss, gradient_accumulation_steps=accumulate
        )
        self.states = {
            "model": self.model,
            "optimizer": self.optimizer,
            "trainer": self.trainer,
            "clipper": self.clipper,
        }


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ignites_trainer_clips(accumulate: int) -> None:
    training = Training(MAX_NORM, accumulate)
    training.trainer.run(data(), max_epochs=1)
    by_hand = Training(float("inf"), accumulate)
    for i, (x, y) in enumerate(data()):
        (nn.functional.mse_loss(by_hand.model(x), y) / accumulate).backward()
        if i % accumulate == accumulate - 1:
            torchclip.clip_grad_norm_(by_hand.model, MAX_NORM)
            by_hand.optimizer.step()
            by_hand.optimizer.zero_grad()
    assert training.clipper.history.summary().clipped == 6 // accumulate
    assert_same(training.model.state_dict(), by_hand.model.state_dict())


def test_ignites_checkpoints_carry_the_clipper(tmp_path: Path) -> None:
    """Training continues from a checkpoint as if it had not been interrupted."""
    whole = Training(torchclip.Percentile(30.0, warmup=2))
    keeper = Checkpoint(whole.states, DiskSaver(str(tmp_path)), n_saved=None)
    whole.trainer.add_event_handler(Events.EPOCH_COMPLETED, keeper)
    whole.trainer.run(data(), max_epochs=2)
    resumed = Training(torchclip.Percentile(30.0, warmup=2))
    Checkpoint.load_objects(resumed.states, checkpoint=torch.load(tmp_path / "checkpoint_6.pt"))
    resumed.trainer.run(data(), max_epochs=2)
    assert list(resumed.clipper.history) == list(whole.clipper.history)
    assert_same(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
