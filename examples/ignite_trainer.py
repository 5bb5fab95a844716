"""Ignite: the optimizer clips, with Ignite's usual trainer.

pip install '.[ignite]'
python examples/ignite_trainer.py
"""

import torch
from ignite.engine import Engine, Events, create_supervised_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchclip

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
clipper = torchclip.Clipper(optimizer, max_norm=3.0)

x = torch.randn(2048, 16)
data = DataLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=64, shuffle=True)
trainer = create_supervised_trainer(model, optimizer, nn.functional.mse_loss)


@trainer.on(Events.EPOCH_COMPLETED)
def report(engine: Engine) -> None:
    norm = clipper.history[-1].total_norm
    print(f"epoch {engine.state.epoch}: loss {engine.state.output:.4f}, norm {norm:.3g}")


# To resume from a checkpoint: Checkpoint({"model": model, "optimizer": optimizer, "clipper": clipper}, ...)
trainer.run(data, max_epochs=3)
print(clipper.history.summary())
