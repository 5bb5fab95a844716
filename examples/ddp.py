"""DDP: after backward() all ranks have the same gradients, so all clip by the same norm.

pip install .
torchrun --nproc-per-node=2 examples/ddp.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import torchclip

accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
device = accelerator or torch.device("cpu")
dist.init_process_group()
rank, ranks = dist.get_rank(), dist.get_world_size()
if device.type != "cpu":
    torch.get_device_module(device).set_device(rank % torch.accelerator.device_count())

torch.manual_seed(0)
model = DistributedDataParallel(
    nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1)).to(device),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
clipper = torchclip.Clipper(optimizer, max_norm=0.1)

for _ in range(50):
    x = torch.randn(64, 64).chunk(ranks)[rank].to(device)  # this rank's share of the same batch
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), x.sin().mean(1, keepdim=True))
    loss.backward()  # averages the gradients of all ranks
    optimizer.step()

norms: list[float | None] = [None] * ranks
dist.all_gather_object(norms, clipper.history[-1].total_norm)
if rank == 0:
    print(f"norm of the last step on each rank: {norms}")
    print(clipper.history.summary(), flush=True)
dist.barrier()  # torch may abort at exit if a gather was the last call
dist.destroy_process_group()
