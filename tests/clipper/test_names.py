"""Names of parameters, from a model or from the optimizer, and the norms of single parameters by name."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from clipper_helpers import INF, NAN, Net, train
from helpers import interrupted_sgd, with_gradients
from torch import nn
from torch.amp import GradScaler
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import SGD

from torchclip import Clipper
from torchclip.clipper import Scope

NAMES = ["embedding.weight", "inner.weight", "outer.weight"]


class Wrapper(nn.Module):
    """A user's model with a module of the name that data parallelism gives to its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def compiled(model: nn.Module) -> nn.Module:
    return cast("nn.Module", torch.compile(model, backend="eager"))


def linear(outputs: int = 2) -> nn.Module:
    return nn.Linear(2, outputs, bias=False)


def shared() -> nn.Module:
    model = nn.Sequential(linear(), linear())
    model[1].weight = model[0].weight
    return model


def names_in(clipper: Clipper) -> list[str]:
    for group in clipper.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    return sorted(clipper.norms())


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (Net, NAMES),
        (lambda: nn.DataParallel(Net()), NAMES),
        (lambda: compiled(Net()), NAMES),
        (lambda: compiled(nn.DataParallel(Net())), NAMES),
        (lambda: nn.DataParallel(compiled(Net())), NAMES),
        (lambda: checkpoint_wrapper(Net()), NAMES),
        (lambda: Wrapper(Net()), [f"module.{name}" for name in NAMES]),
        (lambda: Wrapper(nn.DataParallel(Net())), [f"module.{name}" for name in NAMES]),
        (lambda: nn.DataParallel(Wrapper(nn.DataParallel(Net()))), [f"module.{name}" for name in NAMES]),
        (lambda: nn.Sequential(compiled(linear())), ["0.weight"]),
        (shared, ["0.weight"]),
        (lambda: [nn.Linear(2, 2), nn.Sequential(linear())], ["0.weight", "bias", "weight"]),
        (lambda: (linear(), linear()), ["model[0].weight", "model[1].weight"]),
    ],
)
def test_a_models_names_without_what_wrappers_put_before_them(
    make: Callable[[], Any], names: list[str]
) -> None:
    model = make()
    models = [model] if isinstance(model, nn.Module) else model
    optimizer = SGD([p for each in models for p in each.parameters()], lr=0.1)
    assert names_in(Clipper(optimizer, 1.0, model=model)) == names


def test_the_models_names_come_before_the_optimizers() -> None:
    model = Wrapper(linear())
    optimizer = SGD(model.module.named_parameters(), lr=0.1)
    assert names_in(Clipper(optimizer, 1.0, model=model)) == ["module.weight"]


def test_names_of_the_optimizer_and_of_places_in_it() -> None:
    first, second = linear(), linear()
    optimizer = SGD([{"params": m.named_parameters()} for m in (first, second)], lr=0.1)
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(2)))
    clipper = Clipper(optimizer, 1.0, nonfinite="error")
    places = ["param_groups[0]['params'][1]", "param_groups[1]['params'][0]"]
    assert names_in(clipper) == [*places, "weight"]
    optimizer.param_groups[0]["params"][1].grad[0] = NAN
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[1\] of shape \(2,\)"):
        optimizer.step()


def test_parameters_that_are_added_later_and_such_as_no_model_has() -> None:
    model = nn.Sequential(linear())
    optimizer = SGD(model.parameters(), lr=0.1)
    clipper = Clipper(optimizer, 1.0, model=model)
    model.append(linear(3))
    optimizer.add_param_group({"params": [*model[1].parameters(), *with_gradients([torch.ones(2)])]})
    assert names_in(clipper) == ["0.weight", "1.weight", "param_groups[1]['params'][1]"]


# Layers over time


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("scope", ["global", "group", "parameter"])
def test_layers_at_every_third_step(scope: Scope) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1, fused=scope == "global")
    clipper = Clipper(optimizer, 0.5, scope=scope, model=model, layers_every=3)
    norms: list[list[float]] = []
    train(
        model,
        optimizer,
        range(7),
        lambda: norms.append([float(p.grad.norm()) for p in model.parameters() if p.grad is not None]),
    )
    layers = clipper.history.layers
    assert (layers.names, layers.steps) == (NAMES, [0, 3, 6])
    assert layers.norms == pytest.approx(torch.tensor(norms)[::3].numpy(), rel=1e-5)


def test_layers_of_parameters_without_gradients_and_with_shared_ones() -> None:
    first, second, third, fourth = with_gradients(
        [torch.tensor([3.0, 4.0]), None, torch.tensor([INF]), torch.zeros(0)]
    )
    fourth.grad = None
    optimizer = SGD([first, second, third, fourth], lr=1.0)
    clipper = Clipper(optimizer, INF, layers_every=1)
    optimizer.step()
    second.grad, third.grad, first.grad = first.grad, torch.tensor([2.0]), None
    fourth.grad = torch.zeros(0)
    optimizer.step()
    assert clipper.history.layers.norms.tolist() == [[5.0, 0.0, INF, 0.0], [0.0, 5.0, 2.0, 0.0]]


def test_layers_are_of_steps_that_were_taken_and_of_unscaled_gradients() -> None:
    (weight,) = with_gradients([torch.zeros(2)])
    optimizer = SGD([weight], lr=1.0, fused=True)
    clipper = Clipper(optimizer, 1.0, layers_every=2)

    def step() -> None:
        scaler = GradScaler("cpu", init_scale=1024.0)
        weight.grad = torch.tensor([3.0, 4.0]) * scaler.scale(torch.tensor(1.0))
        scaler.step(optimizer)

    with interrupted_sgd():
        step()
    assert len(clipper.history.layers) == 0
    step()
    assert (clipper.history.layers.steps, clipper.history.layers.norms.tolist()) == ([0], [[5.0]])
