"""An interrupt between a step's record and the count of skipped steps."""

from __future__ import annotations

import pytest
import torch

from torchclip import Clipper
from torchclip.clipper.skip_above import InARow


def test_a_skipped_step_counts_though_its_end_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([torch.inf])
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    clipper = Clipper(optimizer, 1.0, nonfinite="skip", max_skips=2)

    def interrupt(count: InARow) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(InARow, "end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    optimizer.step()
    assert clipper.state_dict()["skips"]["nonfinite"] == 2
    with pytest.raises(RuntimeError, match="2 steps in a row were skipped"):
        optimizer.step()
    assert len(clipper.history) == 2
