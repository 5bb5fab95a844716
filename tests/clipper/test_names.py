"""Names of parameters, from a model or from the optimizer, and the norms of single parameters by name."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from clipper_helpers import INF, NAN, Net, backward, sgd, train
from helpers import interrupted_sgd, with_gradients
from torch import nn
from torch.amp import GradScaler
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from torchclip import Clipper
from torchclip.clipper import Scope

NAMES = ["embedding.weight", "inner.weight", "outer.weight"]


class Wrapper(nn.Module):
    """A user's model with a module of the name that data parallelism gives to its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def gradients_of(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)


def names_in(clipper: Clipper) -> list[str]:
    gradients_of(clipper.optimizer)
    return sorted(clipper.norms())


@pytest.mark.parametrize(
    ("wrapped", "names"),
    [
        (lambda m: m, NAMES),
        (nn.DataParallel, NAMES),
        (lambda m: torch.compile(m, backend="eager"), NAMES),
        (lambda m: torch.compile(nn.DataParallel(m), backend="eager"), NAMES),
        (lambda m: nn.DataParallel(cast("nn.Module", torch.compile(m, backend="eager"))), NAMES),
        (checkpoint_wrapper, NAMES),
        (Wrapper, [f"module.{name}" for name in NAMES]),
        (lambda m: Wrapper(nn.DataParallel(m)), [f"module.{name}" for name in NAMES]),
        (lambda m: nn.DataParallel(Wrapper(nn.DataParallel(m))), [f"module.{name}" for name in NAMES]),
    ],
)
def test_a_models_names_without_what_wrappers_put_before_them(
    wrapped: Callable[[nn.Module], Any], names: list[str]
) -> None:
    model = wrapped(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert names_in(Clipper(optimizer, 1.0, model=model)) == names


def test_layers_that_were_compiled_one_by_one() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0] = torch.compile(model[0], backend="eager")  # type: ignore[assignment]
    assert names_in(Clipper(torch.optim.SGD(model.parameters(), lr=0.1), 1.0, model=model)) == ["0.weight"]


def test_the_models_names_come_before_the_optimizers() -> None:
    model = Wrapper(nn.Linear(2, 2, bias=False))
    optimizer = torch.optim.SGD(model.module.named_parameters(), lr=0.1)
    assert names_in(Clipper(optimizer, 1.0, model=model)) == ["module.weight"]


def test_parameters_that_are_added_later_and_such_as_no_model_has() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = Clipper(optimizer, 1.0, model=model)
    model.append(nn.Linear(2, 3, bias=False))
    optimizer.add_param_group({"params": [*model[1].parameters(), *with_gradients([torch.ones(2)])]})
    assert names_in(clipper) == ["0.weight", "1.weight", "param_groups[1]['params'][1]"]


@pytest.mark.parametrize("several", [list, tuple])
def test_several_models(several: Callable[[Any], Any]) -> None:
    actor, critic = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 1, bias=False))
    for models, names in (
        ([actor, critic], ["0.weight", "bias", "weight"]),
        ([actor, critic[0]], ["bias", "model[0].weight", "model[1].weight"]),  # of the same names
    ):
        optimizer = torch.optim.SGD([*actor.parameters(), *critic.parameters()], lr=0.1)
        assert names_in(Clipper(optimizer, 1.0, model=several(models))) == names


def test_tied_parameters_have_their_first_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert names_in(Clipper(torch.optim.SGD(model.parameters(), lr=0.1), 1.0, model=model)) == ["0.weight"]


def test_errors_name_the_models_parameters() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Clipper(optimizer, 1.0, nonfinite="error", model=model)
    gradients_of(optimizer)
    optimizer.param_groups[0]["params"][1].grad[0] = NAN
    with pytest.raises(RuntimeError, match=r"inner\.weight of shape \(6, 4\) \(0 inf, 4 nan\)"):
        optimizer.step()


@pytest.mark.parametrize("model", [1, "model", [nn.Linear(1, 1), None], nn.Linear, [[nn.Linear(1, 1)]]])
def test_what_is_no_model_is_refused(model: Any) -> None:
    optimizer = sgd([torch.ones(1)])
    with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module or a list of them"):
        Clipper(optimizer, 1.0, model=model)
    Clipper(optimizer, 1.0)


# Layers over time


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("scope", ["global", "group", "parameter"])
def test_layers_at_every_third_step(scope: Scope) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=scope == "global")
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


def test_without_layers_every_there_are_none() -> None:
    optimizer = sgd([torch.ones(2)])
    clipper = Clipper(optimizer, 1.0)
    optimizer.step()
    assert len(clipper.history.layers) == 0


def test_layers_of_parameters_without_gradients_and_with_shared_ones() -> None:
    first, second, third, fourth = with_gradients(
        [torch.tensor([3.0, 4.0]), None, torch.tensor([INF]), torch.zeros(0)]
    )
    fourth.grad = None
    optimizer = torch.optim.SGD([first, second, third, fourth], lr=1.0)
    clipper = Clipper(optimizer, INF, layers_every=1)
    optimizer.step()
    second.grad, third.grad, first.grad = first.grad, torch.tensor([2.0]), None
    fourth.grad = torch.zeros(0)
    optimizer.step()
    assert clipper.history.layers.norms.tolist() == [[5.0, 0.0, INF, 0.0], [0.0, 5.0, 2.0, 0.0]]


def test_layers_are_of_steps_that_were_taken_and_of_unscaled_gradients() -> None:
    (weight,) = with_gradients([torch.zeros(2)])
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    clipper = Clipper(optimizer, 1.0, layers_every=2)
    scaler = GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.tensor(1.0))
    weight.grad = torch.tensor([3.0, 4.0]) * 1024
    with interrupted_sgd():
        scaler.step(optimizer)
    assert len(clipper.history.layers) == 0
    scaler = GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.tensor(1.0))
    weight.grad = torch.tensor([3.0, 4.0]) * 1024
    scaler.step(optimizer)
    assert (clipper.history.layers.steps, clipper.history.layers.norms.tolist()) == ([0], [[5.0]])


def test_layers_of_lbfgs() -> None:
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3)
    clipper = Clipper(optimizer, 0.5, model=model, layers_every=1)
    for step in range(2):
        optimizer.step(lambda step=step: backward(model, optimizer, step))
    assert clipper.history.layers.steps == [0, 1]


@pytest.mark.parametrize("layers_every", [-1, 1.5, "1", None, True])
def test_layers_every_is_a_count(layers_every: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="`layers_every`"):
        Clipper(sgd([torch.ones(1)]), 1.0, layers_every=layers_every)
