"""What to call the parameters that an optimizer holds, and the norm of each by its name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from torchclip._core import arguments, gather, scalars
from torchclip._core.batch import Norms
from torchclip.clipper.scope import place, unscaled

__all__ = ["Names"]

# What torch's wrappers put into names; no module of a user's is called so.
_WRAPPED = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


class Names:
    """Names of the parameters of an optimizer, found anew each time, as parameters may be added later.

    Args:
        optimizer: the optimizer, which knows names itself if it was made from ``named_parameters()``.
        model: a module, or several, whose names come first; None for none.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module | Sequence[nn.Module] | None) -> None:
        self._optimizer = optimizer
        self._models = _modules(model)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters of the optimizer, by the name that a model or it knows, or else their place."""
        of_models = _names_in(self._models)
        used = set()
        for i, group in enumerate(self._optimizer.param_groups):
            of_group = group.get("param_names", ())
            for j, parameter in enumerate(group["params"]):
                # A parameter may have been added to the list without a name, and two models share names.
                name = of_models.get(id(parameter)) or (of_group[j] if j < len(of_group) else None)
                if name is None or name in used:
                    name = f"{place(i, 'params')}[{j}]"
                used.add(name)
                yield name, parameter

    def of_gradients(self) -> dict[int, str]:
        """What to call each gradient in an error, by its id."""
        return {id(p.grad): name for name, p in self.named_parameters() if p.grad is not None}

    def norms(self, order: float) -> tuple[list[str], list[bool], Norms]:
        """The norm of each parameter's gradient as it is now, without a GradScaler's scale.

        All ranks must ask for it if one does.

        Returns:
            The names of all parameters, which of them have a gradient, and the norms: below 0 without one.
        """
        named = dict(self.named_parameters())
        batch = gather.gradients(list(named.values()))
        grad_scale = getattr(self._optimizer, "grad_scale", None)
        norms = unscaled(batch.norms(order), grad_scale, order)
        index_of = {id(grad): i for i, grad in enumerate(batch.all)}
        indices = [len(norms) if p.grad is None else index_of[id(p.grad)] for p in named.values()]
        present = [index < len(norms) for index in indices]
        if isinstance(norms, list):
            norms = [*norms, scalars.ABSENT]
            return list(named), present, [norms[index] for index in indices]
        if indices != list(range(len(norms))):
            padded = torch.cat([norms, norms.new_full((1,), scalars.ABSENT)])
            norms = padded[torch.tensor(indices).to(norms.device, non_blocking=True)]
        return list(named), present, norms


def _modules(model: Any) -> list[nn.Module]:
    if model is None:
        return []
    models = [model] if isinstance(model, nn.Module) else model
    if not isinstance(models, (list, tuple)) or not all(isinstance(each, nn.Module) for each in models):
        raise TypeError(
            f"`model` must be a torch.nn.Module or a list of them, got {arguments.shown(model)}; pass the "
            "module whose parameters the optimizer holds, or leave it out"
        )
    return list(models)


def _names_in(models: Sequence[nn.Module]) -> dict[int, str]:
    """The names of some models' parameters by their ids; ``model[1].weight`` if two have such a name."""
    of_each = [{id(p): name for name, p in _named_parameters(model)} for model in models]
    names: dict[int, str] = {}
    for i, of_model in enumerate(of_each):
        others = {name for j, each in enumerate(of_each) if j != i for name in each.values()}
        for key, name in of_model.items():
            names.setdefault(key, f"model[{i}].{name}" if name in others else name)
    return names


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's parameters by the names that they have without torch's wrappers."""
    wrappers = [
        f"{path}." if path else ""
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (DataParallel, DistributedDataParallel))
    ]
    for name, parameter in model.named_parameters():
        for path in reversed(wrappers):  # the inner ones first, as long as their paths hold
            if name.startswith(f"{path}module."):
                name = path + name[len(path) + len("module.") :]
        for wrapped in _WRAPPED:
            name = name.replace(wrapped, "")
        yield name, parameter
