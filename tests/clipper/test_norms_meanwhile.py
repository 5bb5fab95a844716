"""norms() while another thread replaces gradients."""

from __future__ import annotations

import pytest
import torch

from torchclip import Clipper
from torchclip._core import gather


def test_norms_leave_out_a_gradient_that_is_replaced_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.tensor([3.0, 4.0])
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    clipper = Clipper(optimizer, 1.0)
    gradients = gather.gradients

    def replaced_after(*args: object, **kwargs: object) -> object:
        batch = gradients(*args, **kwargs)  # type: ignore[arg-type]
        parameters[1].grad = torch.tensor([6.0, 8.0])  # as another thread may at this moment
        return batch

    monkeypatch.setattr(gather, "gradients", replaced_after)
    assert clipper.norms() == {"param_groups[0]['params'][0]": 5.0}
    monkeypatch.undo()
    assert list(clipper.norms().values()) == [10.0, 5.0]
