"""Lightning with manual optimization: two optimizers that step together, clipped by one norm.

pip install 'torchclip[lightning]'
python examples/lightning_two_optimizers.py
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchclip


class Regression(LightningModule):
    """SGD with momentum trains matrices, AdamW everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
        self.norms: list[float] = []

    def configure_optimizers(self) -> Any:
        parameters = list(self.net.parameters())
        return [
            torch.optim.SGD([p for p in parameters if p.ndim == 2], lr=0.02, momentum=0.9),
            torch.optim.AdamW([p for p in parameters if p.ndim < 2], lr=1e-2),
        ]

    def on_fit_start(self) -> None:
        # One Clipper for both: the first step of a batch clips the gradients of both.
        self.clipper = torchclip.Clipper(self.trainer.optimizers, max_norm=0.5, model=self)

    def training_step(self, batch: list[Tensor], index: int) -> None:
        inputs, targets = batch
        optimizers: Any = self.optimizers()
        loss = (self.net(inputs) - targets).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        self.clipper.loss = loss.detach()
        for optimizer in optimizers:
            optimizer.step()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["clipper"] = self.clipper.state_dict()

    def on_fit_end(self) -> None:
        self.clipper.detach()


if __name__ == "__main__":
    torch.manual_seed(0)
    inputs = torch.randn(256, 8)
    targets = inputs.sum(dim=1, keepdim=True)
    module = Regression()
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, DataLoader(TensorDataset(inputs, targets), batch_size=32))
    print(module.clipper.history.summary())
    print(f"loss {module.clipper.history[0].loss:.2f} -> {module.clipper.history[-1].loss:.2f}")
