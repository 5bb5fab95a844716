"""Names of parameters, from a model or from the optimizer, and the norms of single parameters by name."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from clipper_helpers import NAN, Net
from helpers import with_gradients
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import SGD

from torchclip import Clipper

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
