"""The Hugging Face Trainer with two optimizers in one, clipped by one norm.

    pip install 'torchclip[transformers]'
    python examples/transformers_two_optimizers.py

The Trainer takes one optimizer, so a container holds both, as in torchtitan.  The container is an optimizer
itself, and a Clipper on it clips before both optimizers step.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from torchclip.integrations.transformers import ClipperCallback


class Optimizers(torch.optim.Optimizer):
    """Several optimizers that step together, as one."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__(
            [p for each in optimizers for group in each.param_groups for p in group["params"]], {}
        )
        # The optimizers' own groups, so that a schedule reaches them.
        self.param_groups = [group for each in optimizers for group in each.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)


class Regression(nn.Module):
    """Learns a sum; the Trainer wants the loss from the model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.net(inputs)
        return {"loss": (outputs - labels).square().mean(), "logits": outputs}


if __name__ == "__main__":
    torch.manual_seed(0)
    data = [{"inputs": row, "labels": row.sum().view(1)} for row in torch.randn(256, 8)]
    model = Regression()
    parameters = list(model.parameters())
    optimizer = Optimizers(
        [
            torch.optim.SGD([p for p in parameters if p.ndim == 2], lr=0.02, momentum=0.9),
            torch.optim.AdamW([p for p in parameters if p.ndim < 2], lr=1e-2),
        ]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
    callback = ClipperCallback(max_norm=0.5)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_grad_norm=0.0,
            per_device_train_batch_size=32,
            num_train_epochs=2,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(
            model, arguments, train_dataset=data, optimizers=(optimizer, schedule), callbacks=[callback]
        ).train()
    assert callback.clipper is not None
    history = callback.clipper.history
    print(history.summary())
    print(f"loss {history[0].loss:.2f} -> {history[-1].loss:.2f}")
