"""Optimizers without parameter groups, or with empty ones."""

from __future__ import annotations

import pytest
import torch

from torchclip import Clipper


@pytest.mark.parametrize("scope", ["global", "group", "parameter"])
def test_an_optimizer_that_has_lost_its_groups_steps_with_a_norm_of_0(scope: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    clipper = Clipper(optimizer, 1.0, scope=scope)  # type: ignore[arg-type]
    groups = [*optimizer.param_groups]
    optimizer.param_groups.clear()
    optimizer.step()
    optimizer.param_groups.extend(groups)
    optimizer.step()
    assert [record.total_norm for record in clipper.history] == [0.0, 5.0]
