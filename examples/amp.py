"""Mixed precision with a GradScaler, and gradient accumulation: clipping sees the unscaled gradients.

pip install .
python examples/amp.py
"""

import torch
from torch import nn
from torch.nn import functional as F

import torchclip

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
accumulate = 2

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 128), nn.GELU(), nn.Linear(128, 1)).to(device)
optimizer = torch.optim.AdamW(model.named_parameters(), lr=3e-3, fused=True)
scaler = torch.amp.GradScaler(device.type, growth_interval=20)
clipper = torchclip.Clipper(optimizer, max_norm=1.0)

for step in range(100):
    optimizer.zero_grad()
    for _ in range(accumulate):
        x = torch.randn(64, 16, device=device)
        with torch.autocast(device.type, torch.float16):
            prediction = model(x)
        loss = F.mse_loss(prediction.float(), x.sin().sum(1, keepdim=True)) / accumulate
        scaler.scale(loss).backward()
    scaler.step(optimizer)  # no scaler.unscale_(optimizer) needed
    scaler.update()
    if step % 20 == 19:
        print(f"step {step + 1}: loss {accumulate * loss:.3f}, scale {scaler.get_scale():g}")

print(clipper.history.summary())
