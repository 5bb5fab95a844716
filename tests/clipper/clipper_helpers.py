"""Shared by the tests of the Clipper: models, optimizers with gradients, and a threshold object."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from helpers import bits, randn, with_gradients
from torch import Tensor, nn

INF, NAN = math.inf, math.nan


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "ASGD": {"lr": 0.1},
    "Adadelta": {"lr": 1.0},
    "Adafactor": {"lr": 0.05},
    "Adagrad": {"lr": 0.1},
    "Adam": {"lr": 0.05},
    "AdamW": {"lr": 0.05},
    "Adamax": {"lr": 0.05},
    # Without a line search it diverges on processors that round differently.
    "LBFGS": {"max_iter": 3, "line_search_fn": "strong_wolfe"},
    "NAdam": {"lr": 0.05},
    "RAdam": {"lr": 0.05},
    "RMSprop": {"lr": 0.05},
    "Rprop": {"lr": 0.05},
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "SparseAdam": {"lr": 0.05},
}
if hasattr(torch.optim, "Muon"):  # since torch 2.9
    OPTIMIZERS["Muon"] = {"lr": 0.05}


def takes(name: str, arguments: dict[str, Any]) -> bool:
    return arguments.keys() <= inspect.signature(getattr(torch.optim, name)).parameters.keys()


FUSED = [name for name in OPTIMIZERS if takes(name, {"fused": True})]


fused_or_not = pytest.mark.parametrize("fused", [False, True])


each_scope = pytest.mark.parametrize("scope", ["global", "group", "parameter"])


class Net(nn.Module):
    """Matrices only, as Muon takes nothing else."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4, sparse=sparse)
        self.inner = nn.Linear(4, 6, bias=False)
        self.outer = nn.Linear(6, 2, bias=False)
        for i, parameter in enumerate(self.parameters()):
            parameter.data = randn(*parameter.shape, seed=i)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.outer(torch.tanh(self.inner(self.embedding(tokens))))
        return scores


def loss_of(model: nn.Module, step: int) -> Tensor:
    tokens = torch.tensor([0, 1, 2, step % 5])
    loss: Tensor = ((model(tokens) - randn(4, 2, seed=step)) ** 2).sum()
    return loss


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Tensor:
    optimizer.zero_grad()
    loss = loss_of(model, step)
    loss.backward()
    return loss


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int],
    before_step: Callable[[], object] = lambda: None,
) -> None:
    for step in steps:
        backward(model, optimizer, step)
        before_step()
        optimizer.step()


def equal(first: nn.Module, second: nn.Module) -> bool:
    return all(bits(a) == bits(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def everything(optimizer: torch.optim.Optimizer) -> tuple[list[bytes], list[tuple[str, Any]]]:
    """Everything that a step may change, except the gradients."""
    weights = [bits(p) for group in optimizer.param_groups for p in group["params"]]
    states = [item for state in optimizer.state.values() for item in state.items()]
    return weights, [(key, bits(value) if isinstance(value, Tensor) else value) for key, value in states]


def gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [
        p.grad.to_dense() for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]


def sgd(grads: Sequence[Tensor | None], lr: float = 1.0, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(with_gradients(grads), lr=lr, **options)


def two_groups(fused: bool = False, **second: Any) -> torch.optim.SGD:
    """Gradients of norms 5 and 10."""
    first, other = with_gradients([torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0])])
    return torch.optim.SGD([{"params": [first]}, {"params": [other], **second}], lr=1.0, fused=fused)


def grad_norms(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(g.norm()) for g in gradients(optimizer)]


class Answering:
    """A threshold object that returns these numbers in turn."""

    def __init__(self, *answers: Any) -> None:
        self.answers = answers
        self.asked: list[float] = []

    def update(self, norm: float) -> Any:
        self.asked.append(norm)
        return self.answers[(len(self.asked) - 1) % len(self.answers)]

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.asked = list(state["asked"])
