"""The names of optimizers' parameters, and the norm of each by its name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from torchclip._core import arguments, gather, scalars
from torchclip._core.batch import Norms
from torchclip._core.ranks.exchange import Kind
from torchclip.clipper.optimizers import Group, grad_scale_of, groups_of, parameters_of, unscaled

# Parts that torch's wrappers add to names; users' modules do not have such names.
_WRAPPED = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


class _Known(NamedTuple):
    """A parameter's name, and where a module holds it: nothing here refers to the parameter."""

    name: str
    owner: ref[nn.Module]
    key: str


class Names:
    """Names of the parameters of some optimizers, which may get more of them later.

    It keeps neither optimizers, models nor parameters alive, and refers to no parameter.

    Args:
        optimizers: the optimizers, which know names themselves if they were made from ``named_parameters()``.
        model: a module, or several, whose names take precedence; None for none.

    Attributes:
        count: the number of optimizers.
        has_model: whether there is a model.
        replicas: the process groups over which DistributedDataParallel replicates it.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], model: nn.Module | Sequence[nn.Module] | None
    ) -> None:
        models = _modules(model)
        self.count = len(optimizers)
        self._models = [ref(each) for each in models]
        # Also for parameters of models that no longer exist, such as a list of modules made for this call.
        self._known = _by_id(models)
        self.has_model = bool(models)
        self.replicas = [
            module.process_group
            for each in models
            for module in each.modules()
            if isinstance(module, DistributedDataParallel)
        ]
        held = parameters_of(*optimizers)
        if models and held and not any(id(p) in self._known for p in held):
            raise ValueError(
                "`model` has none of the parameters that the optimizer holds; pass the module that the "
                "optimizer was made from"
            )

    def _in_models(self, parameters: Sequence[Tensor]) -> dict[int, str]:
        """The names of some parameters in the models, by their ids.

        Models are only walked again, which takes long, if a parameter is not known yet.
        """
        found = self._known_names(parameters)
        models = [model() for model in self._models]
        if len(found) < len({*map(id, parameters)}) and None not in models:
            self._known.update(_by_id([model for model in models if model is not None]))
            found = self._known_names(parameters)
        return found

    def _known_names(self, parameters: Sequence[Tensor]) -> dict[int, str]:
        held = [(p, self._known[id(p)]) for p in parameters if id(p) in self._known]
        # Another parameter may have got the id of one that is gone.
        return {id(p): known.name for p, known in held if getattr(known.owner(), known.key, None) is p}

    def named_parameters(self, optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, Tensor]]:
        """All parameters of the optimizers, by their name in a model or optimizer, else by position."""
        of_models = self._in_models(parameters_of(*optimizers))
        used: set[str] = set()
        for group in groups_of(optimizers):
            of_group = group.values.get("param_names", ())
            for j, parameter in enumerate(group.parameters):
                # A parameter may have been added to the list without a name, and two models may share names.
                name = of_models.get(id(parameter)) or (of_group[j] if j < len(of_group) else None)
                if name is None or name in used:
                    name = f"{group.place('params')}[{j}]"
                used.add(name)
                yield name, parameter

    def in_model_order(self, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
        """All parameters by their names, in the order of the model if there is one."""
        place = {key: i for i, key in enumerate(self._known)}
        named = list(self.named_parameters(optimizers))
        return dict(sorted(named, key=lambda each: place.get(id(each[1]), len(place))))

    def of_gradients(self, optimizers: Sequence[Optimizer]) -> dict[int, str]:
        """The name of each gradient in an error, by its id."""
        return {id(p.grad): name for name, p in self.named_parameters(optimizers) if p.grad is not None}

    def norms(self, optimizers: Sequence[Optimizer], norm_type: float) -> tuple[list[str], list[bool], Norms]:
        """The current norm of each parameter's gradient, without a GradScaler's scale.

        If one rank calls this, all ranks must.

        Returns:
            The names of all parameters, which of them have a gradient, and the norms: negative without one.
        """
        named = self.in_model_order(optimizers)
        batch = gather.gradients(list(named.values()), kind=Kind.MEASURE_EACH)
        norms = unscaled(batch.norms(norm_type), grad_scale_of(optimizers), norm_type)
        index_of = {id(grad): i for i, grad in enumerate(batch.all)}
        # Another thread may give a parameter a new gradient, which is not among those that were measured.
        places = [None if p.grad is None else index_of.get(id(p.grad)) for p in named.values()]
        return list(named), [place is not None for place in places], scalars.at(norms, places)

    def largest_norms(self, optimizers: Sequence[Optimizer], norm_type: float) -> dict[str, float]:
        """The norm of each gradient by its parameter's name: non-finite ones first, then the largest."""
        names, present, norms = self.norms(optimizers, norm_type)
        named = zip(names, present, scalars.numbers(norms), strict=True)
        found = {name: max(norm, 0.0) for name, has_gradient, norm in named if has_gradient}
        return dict(sorted(found.items(), key=lambda item: (math.isfinite(item[1]), -item[1])))

    def of_sets(self, groups: Sequence[Group], each: bool) -> list[list[str]]:
        """For each group the name of its norm, or the names of the norms of each of its parameters.

        Those of a single optimizer are named by position.  Do not change the lists.
        """
        if not each:
            return [[group.name] for group in groups]
        by_place = [_names(group.name, len(group.parameters)) for group in groups]
        if not self.has_model or not any(group.several for group in groups):
            return by_place
        # A parameter of two optimizers has its name from the first of them.
        names = self._in_models([p for group in groups for p in group.parameters])
        return [
            [names.pop(id(p), place) for p, place in zip(group.parameters, places, strict=True)]
            for group, places in zip(groups, by_place, strict=True)
        ]


@cache
def _names(of_all: str, count: int) -> list[str]:
    """The names of a group's parameters; always the same list, which must not be changed."""
    return [f"{of_all}, parameter {i}" for i in range(count)]


def _modules(model: Any) -> list[nn.Module]:
    if model is None:
        return []
    models = [model] if isinstance(model, nn.Module) else model
    if not isinstance(models, (list, tuple)) or not all(isinstance(each, nn.Module) for each in models):
        raise TypeError(
            f"`model` must be a torch.nn.Module or a list of them, got {arguments.shown(model)}; pass the "
            "module whose parameters the optimizer holds, or do not pass it"
        )
    return list(models)


def _by_id(models: Sequence[nn.Module]) -> dict[int, _Known]:
    """The parameters of some models with their names, by their ids."""
    names = {id(p): name for p, name in names_in(models)}
    return {
        id(p): _Known(names[id(p)], ref(module), key)
        for model in models
        for module in model.modules()
        for key, p in module.named_parameters(recurse=False)
        if id(p) in names
    }


def names_in(models: Sequence[nn.Module]) -> list[tuple[Tensor, str]]:
    """The parameters of some models with their names; ``model[1].weight`` if two have the same name."""
    of_each = [[(p, name) for name, p in unwrapped_names(model)] for model in models]
    found: dict[int, tuple[Tensor, str]] = {}
    for i, of_model in enumerate(of_each):
        others = {name for j, each in enumerate(of_each) if j != i for _, name in each}
        for p, name in of_model:
            found.setdefault(id(p), (p, f"model[{i}].{name}" if name in others else name))
    return list(found.values())


def unwrapped_names(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's parameters by their names without torch's wrappers."""
    wrappers = [
        f"{path}.module." if path else "module."
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (DataParallel, DistributedDataParallel))
    ]
    for name, parameter in model.named_parameters():
        for wrapper in reversed(wrappers):  # inner ones first, while their paths are valid
            if name.startswith(wrapper):
                name = wrapper.removesuffix("module.") + name.removeprefix(wrapper)
        yield _WRAPPED.sub("", name), parameter
