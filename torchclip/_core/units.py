"""Parameters by their units, for adaptive clipping: rows of a matrix, output channels of a convolution.

The units of a parameter with two or more axes lie along its first axis; a vector or a scalar is one unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from torchclip._core import arguments, gather, memory, operations, rows
from torchclip._core.batch import Norm, Norms
from torchclip._core.ranks import meshes
from torchclip._core.ranks.exchange import Kind
from torchclip._core.scalars import at, on_device

# A power of two by which the norms of units of float64 fit into float64.
_SCALE = 2.0**-64


class Units(NamedTuple):
    """This rank's part of a parameter and of its gradient, unit by unit along the first axis."""

    owner: Tensor | None
    """The gradient as the user sees it; None if there is none on this rank."""
    weight: Tensor
    grad: Tensor | None
    measured: Tensor | None
    """The gradient to measure: a reduced copy if a reduction is pending."""
    split: Tensor | None
    """The parameter, if it is a vector that is split over ranks: then ranks measure it together."""


def of_parameters(items: list[Tensor], given: Any) -> list[Units]:
    """The units of the distinct parameters that have a gradient, here or (of split vectors) on other ranks.

    Args:
        items: the parameters; ranks that wait for this one are told of an error.
        given: what the user passed for them.
    """
    try:
        found = _of_items(gather.distinct(items), items, given)
    except Exception:
        tell_ranks(items)
        raise
    whole = [u.owner for u in found if u.owner is not None and u.split is None]
    reduced = dict(zip(map(id, whole), meshes.reduced_locals_of(whole), strict=True))
    return [
        u._replace(measured=reduced[id(u.owner)].reshape(u.grad.shape))
        if u.owner is not None and u.grad is not None and u.split is None and meshes.pending(u.owner)
        else u
        for u in found
    ]


def tell_ranks(given: Any) -> None:
    """Tell the ranks that wait for this one that it refused its gradients or an argument.

    Args:
        given: what the user passed for the parameters, which may be wrong.
    """
    try:
        items = gather.distinct(arguments.tensor_list("parameters", given))
    except Exception:  # already on its way to the user
        return
    split = [p for p in items if _is_split_vector(p)]
    meshes.reduced_locals_of([p.grad for p in items if p.grad is not None and p not in set(split)])
    _tell_of_norms(split)


def _tell_of_norms(split: list[Tensor]) -> None:
    """Tell the ranks that have further parts of vectors, where their norms are about to be exchanged."""
    gather.tell_ranks([split, [p.detach() for p in split]], None, Kind.CLIP_EACH)


def _of_items(different: list[Tensor], items: list[Tensor], given: Any) -> list[Units]:
    split = set(filter(_is_split_vector, different))
    chosen = [p for p in different if p.grad is not None or p in split]
    held = meshes.locals_of([p.grad for p in chosen if p.grad is not None])
    gather.check_writable(held, items, given)
    place_of = {id(item): place for place, item in enumerate(items)}
    for parameter in chosen:
        _check(place_of[id(parameter)], parameter)
    weights = meshes.locals_of([p.detach() for p in chosen])
    memory.check_has_memory(weights, "parameters")
    local = iter(held)
    return [
        _units(p, weight, None if p.grad is None else next(local), p in split)
        for p, weight in zip(chosen, weights, strict=True)
    ]


def _check(i: int, parameter: Tensor) -> None:
    grad = parameter.grad
    if grad is None:
        return
    if grad.layout != torch.strided and not _is_row_sparse(grad):
        why = "is sparse within its rows" if grad.layout in memory.SPARSE else f"has layout {grad.layout}"
        raise TypeError(
            f"gradient {i} of shape {tuple(grad.shape)} {why}, but adaptive clipping needs whole rows; make "
            "it dense first (`p.grad = p.grad.to_dense()`)"
        )
    if not _split_alike(grad, parameter):
        raise TypeError(
            f"gradient {i} of shape {tuple(grad.shape)} is not split as its parameter is; redistribute it "
            "(`p.grad = p.grad.redistribute(p.device_mesh, p.placements)`)"
        )
    if parameter.dim() > 1 and not _split_axes(parameter) <= {0}:
        raise TypeError(
            f"parameter {i} of shape {tuple(parameter.shape)} is split within its rows over ranks, as by "
            "tensor parallelism, but adaptive clipping needs whole rows on each rank; shard it along the "
            "first axis, or leave it out"
        )


def _units(parameter: Tensor, weight: Tensor, grad: Tensor | None, is_split: bool) -> Units:
    owner = parameter.grad
    if owner is not None and _is_row_sparse(owner):
        values = operations.own_elements(owner)
        return Units(owner, weight[owner.indices()[0]], values, values, None)
    if parameter.dim() < 2:
        weight = weight.reshape(1, -1)
        grad = None if grad is None else grad.view(1, -1)
    return Units(owner, weight, grad, None if is_split else grad, parameter if is_split else None)


def _is_row_sparse(tensor: Tensor) -> bool:
    return tensor.layout == torch.sparse_coo and tensor.sparse_dim() == 1 and tensor.dim() > 1


def norms(units: Sequence[Units], p: float, eps: float) -> list[tuple[Tensor, Tensor]]:
    """The norms of the weights (at least ``eps``) and of the gradients of each parameter's units.

    The norms of vectors that are split over ranks include the parts on other ranks.  Where a norm leaves the
    range of float64, both norms of the unit are multiplied by a small number: only their ratio counts.
    """
    vectors = [u.split for u in units if u.split is not None]
    try:
        of_whole = iter(_norms_of_whole([u for u in units if u.split is None], p, eps))
        # Without a kind they tell nobody: other ranks wait for both at once.
        grads = gather.gradients(vectors)
        weights = gather.tensors([vector.detach() for vector in vectors], kind=None)
    except Exception:
        _tell_of_norms(vectors)
        raise
    of_grads, of_weights = cast("list[Norms]", gather.norms_of([grads, weights], True, p))
    place_of = {id(grad): place for place, grad in enumerate(grads.all)}
    places = [place_of.get(id(vector.grad)) for vector in vectors]
    joint = zip(of_weights, at(of_grads, places), strict=True)
    return [
        next(of_whole) if u.split is None else _on_device(next(joint), u.weight.device, eps) for u in units
    ]


def _norms_of_whole(units: Sequence[Units], p: float, eps: float) -> list[tuple[Tensor, Tensor]]:
    """``norms`` of units that this rank has whole."""
    weights = [u.weight for u in units]
    grads = [u.measured for u in units if u.measured is not None]
    with torch.no_grad():
        of_weights, of_grads = rows.norms_of_rows(weights, p), rows.norms_of_rows(grads, p)
        found = [(w.clamp(min=eps), g) for w, g in zip(of_weights, of_grads, strict=True)]
        for i, both in enumerate(found):
            is_double = weights[i].dtype in memory.DOUBLE or grads[i].dtype in memory.DOUBLE
            if is_double and memory.on_host(both) and bool(torch.maximum(*both).isinf().any()):
                of_weight, of_grad = rows.norms_of_rows([_small(weights[i]), _small(grads[i])], p)
                is_beyond = torch.maximum(*both).isinf()
                scaled = of_weight.clamp(min=eps * _SCALE), of_grad
                found[i] = tuple(map(torch.where, (is_beyond,) * 2, scaled, both))  # type: ignore[assignment]
    return found


def _small(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    memory.as_real(copy).mul_(_SCALE)  # torch's product of a complex infinity and a real number is NaN
    return copy


def _split_axes(tensor: Tensor) -> set[int]:
    """The axes of a tensor that are split over several ranks."""
    if not meshes.is_dtensor(tensor):
        return set()
    places: Any = zip(tensor.placements, tensor.device_mesh.mesh.shape, strict=True)
    return {placement.dim for placement, size in places if size > 1 and not meshes.is_whole(placement)}


def _split_alike(a: Tensor, b: Tensor) -> bool:
    """Whether this rank holds the same elements of two tensors of one shape."""
    if not (meshes.is_dtensor(a) and meshes.is_dtensor(b)):
        return meshes.is_dtensor(a) == meshes.is_dtensor(b)
    pairs = zip(a.placements, b.placements, strict=False)
    return a.device_mesh == b.device_mesh and all(
        mine == other or (meshes.is_whole(mine) and meshes.is_whole(other)) for mine, other in pairs
    )


def _is_split_vector(parameter: Tensor) -> bool:
    return parameter.dim() < 2 and bool(_split_axes(parameter))


def _on_device(norms: Sequence[Norm], device: torch.device, eps: float) -> tuple[Tensor, Tensor]:
    found = on_device(norms, device).clamp(min=0.0)
    return found[:1].clamp(min=eps), found[1:]


def scale_(units: Sequence[Units], clip_coefs: Sequence[Tensor]) -> None:
    """Multiply the gradient of each unit in place by its own number.

    A gradient that several parameters share is multiplied once, by the smallest number.
    """
    of_gradient: dict[int, tuple[Units, Tensor]] = {}
    for each, of_units in zip(units, clip_coefs, strict=True):
        if each.owner is not None and of_units.numel():
            before = of_gradient.get(id(each.owner))
            smallest = of_units if before is None else torch.minimum(before[1], of_units)
            of_gradient[id(each.owner)] = each, smallest
    some = list(of_gradient.values())
    alike: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for (each, of_units), is_changed in zip(some, _changed([part for _, part in some]), strict=True):
        if is_changed and each.owner is not None and each.grad is not None:
            of_one = each.owner, each.grad, of_units
            alike.setdefault((each.grad.dtype, of_units.device), []).append(of_one)
    with operations.writing():
        for (dtype, _), chosen in alike.items():
            together = rows.coefs_for(dtype, torch.cat([of_units for *_, of_units in chosen]))
            parts = torch.split(together, [of_units.numel() for *_, of_units in chosen])
            for (owner, grad, _), of_units in zip(chosen, parts, strict=True):
                rows.scale_rows_(grad, of_units)
                if meshes.is_dtensor(owner):
                    torch.autograd.graph.increment_version(owner)


def _changed(clip_coefs: Sequence[Tensor]) -> Sequence[bool]:
    """Which of several vectors have a number other than 1; those on a device are not read, and count."""
    if not clip_coefs or not memory.on_host(clip_coefs):
        return [True] * len(clip_coefs)
    return [bool((part != 1).any()) for part in clip_coefs]
