"""Lightning: a callback attaches a clipper to the Trainer's optimizers, and logs what it does.

pip install '.[lightning]'
python examples/lightning_callback.py
"""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import torchclip
from torchclip.integrations.lightning import ClipperCallback


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.net.named_parameters(), lr=3e-3)


pl.seed_everything(0)
x = torch.randn(2048, 16)
data = DataLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=64, shuffle=True)

clipping = ClipperCallback(torchclip.Percentile(50.0))  # AutoClip, at the median of the norms so far
trainer = pl.Trainer(
    accelerator="cpu",
    max_epochs=3,
    callbacks=[clipping],
    logger=False,  # a logger receives clip/total_norm, clip/clipped_norm and others
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(Regression(), data)

print({name: round(float(value), 3) for name, value in trainer.logged_metrics.items()})
print(clipping.clippers[0].history.summary())
