"""A plain training loop: an RNN learns to add two numbers, and its optimizer clips.

pip install .
python examples/plain.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchclip

torch.manual_seed(0)
rnn = nn.RNN(input_size=2, hidden_size=64, nonlinearity="relu", batch_first=True)
readout = nn.Linear(64, 1)
optimizer = torch.optim.Adam([*rnn.named_parameters(), *readout.named_parameters("readout")], lr=2e-3)
clipper = torchclip.Clipper(optimizer, max_norm=1.0)  # from now on optimizer.step() clips


def batch(size: int = 32, length: int = 10) -> tuple[Tensor, Tensor]:
    """Sequences of numbers with two marked numbers; the target is the sum of these two."""
    numbers = torch.rand(size, length)
    marks = torch.zeros(size, length).scatter(1, torch.rand(size, length).topk(2).indices, 1.0)
    return torch.stack([numbers, marks], dim=-1), (numbers * marks).sum(1, keepdim=True)


for step in range(300):
    x, y = batch()
    optimizer.zero_grad()
    loss = F.mse_loss(readout(rnn(x)[0][:, -1]), y)
    loss.backward()
    optimizer.step()
    if step % 100 == 99:
        print(f"step {step + 1}: loss {loss:.4f}, norm {clipper.history[-1].total_norm:.3g}")

print(clipper.history.summary())
