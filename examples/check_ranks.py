"""Two experts with two replicas each: a wrong norm without an error, the check, and the right norm.

pip install .
torchrun --nproc-per-node=4 examples/check_ranks.py
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import torchclip

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
replica, expert = mesh.get_local_rank("dp"), mesh.get_local_rank("ep")


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(16, 16)  # the same on all ranks
        torch.manual_seed(1 + expert)
        self.expert = nn.Linear(16, 1)  # different experts along "ep", replicas along "dp"

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.expert(self.router(inputs).relu())
        return output


model = Mixture()
torch.manual_seed(10 + dist.get_rank())  # each rank has its own data
model(torch.randn(32, 16)).square().mean().backward()
for name, p in model.named_parameters():
    assert p.grad is not None
    replicas = mesh.get_group("dp") if name.startswith("expert") else dist.group.WORLD
    dist.all_reduce(p.grad, group=replicas)


def on_all_ranks(norm: Tensor) -> list[float]:
    norms = [torch.zeros_like(norm) for _ in range(4)]
    dist.all_gather(norms, norm)
    return [round(float(each), 4) for each in norms]


# Wrong: each rank gets the norm of its own expert and the router.  An infinite max_norm only measures.
norms = on_all_ranks(torchclip.clip_grad_norm_(model.parameters(), float("inf")))

# What check_ranks says.
report = torchclip.check_ranks(model)
if dist.get_rank() == 0:
    print("wrong:", norms)
    print(report)

# Right: the calls that the report recommends.
grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
part0 = [grad for name, grad in grads.items() if name not in report.local]
part1 = [grad for name, grad in grads.items() if name in report.local]
norm0 = torchclip.get_total_norm(part0)
norm1 = torchclip.get_total_norm(part1, group=mesh["ep"].get_group())
total_norm = torchclip.get_total_norm([norm0, norm1])
torchclip.clip_grads_with_norm_(model.parameters(), 1.0, total_norm)

norms = on_all_ranks(total_norm)
if dist.get_rank() == 0:
    print("right:", norms, flush=True)
dist.barrier()
dist.destroy_process_group()
