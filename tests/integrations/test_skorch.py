"""skorch's own clipping under install()."""

import pytest
import torch
from frameworks import MAX_NORM, assert_same, data
from skorch import NeuralNetRegressor
from skorch.callbacks import GradientNormClipping, regularization
from torch import nn

import torchclip
from torchclip import patch

# The frameworks' warnings depend on their versions and on the machine.
pytestmark = pytest.mark.filterwarnings("ignore")


def trained() -> nn.Module:
    ((x, y),) = data(48)
    torch.manual_seed(0)
    net = NeuralNetRegressor(
        nn.Linear,
        module__in_features=4,
        module__out_features=1,
        callbacks=[GradientNormClipping(MAX_NORM)],
        train_split=None,
        max_epochs=2,
        verbose=0,
    )
    net.fit(x.numpy(), y.numpy())
    module: nn.Module = net.module_
    return module


def test_skorchs_callback_clips_with_torchclip(monkeypatch: pytest.MonkeyPatch) -> None:
    """The callback keeps the function that it has imported, so ``install`` has to come first."""
    assert "skorch.callbacks.regularization.clip_grad_norm_" in torchclip.install()
    torchclip.uninstall()
    plain = trained()
    norms: list[torch.Tensor] = []

    def counting(*args: object, **kwargs: object) -> torch.Tensor:
        norms.append(patch.clip_grad_norm_(*args, **kwargs))  # type: ignore[arg-type]
        return norms[-1]

    monkeypatch.setattr(regularization, "clip_grad_norm_", counting)
    clipped = trained()
    assert len(norms) == 2
    assert all(norm > MAX_NORM for norm in norms)
    assert_same(clipped.state_dict(), plain.state_dict())
