"""torchtitan's container of optimizers, clipped by one norm.

    pip install torchtitan
    python examples/torchtitan_optimizers.py

``OptimizersContainer`` has an optimizer for each part of a pipeline, and steps them one after the other.  A
Clipper on these optimizers clips all gradients by one norm before the first optimizer steps.  If the pipeline
has several ranks, pass ``group=`` as well, so that the norm is that of all stages.
"""

import torch
from torch import nn

import torchclip

try:
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
except ImportError as error:
    raise SystemExit(f"this example needs torchtitan: {error}") from None


if __name__ == "__main__":
    torch.manual_seed(0)
    parts = [nn.Linear(8, 32), nn.Linear(32, 1)]
    config = OptimizersContainer.Config(
        implementation="for-loop",
        param_groups=[
            ParamGroupConfig(pattern="bias$", optimizer_name="Adam", optimizer_kwargs={"lr": 1e-2}),
            ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-2}),
        ],
    )
    container = OptimizersContainer(config, model_parts=parts)
    clipper = torchclip.Clipper(list(container), max_norm=0.5, model=parts)
    for inputs in torch.randn(20, 32, 8):
        loss = (parts[1](torch.tanh(parts[0](inputs))) - inputs.sum(dim=1, keepdim=True)).square().mean()
        container.zero_grad()
        loss.backward()
        clipper.loss = loss
        container.step()
    print(clipper.history.summary())
