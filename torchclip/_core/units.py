"""Parameters by their units, for adaptive clipping: rows of a matrix, output channels of a convolution.

The units of a parameter with two or more axes lie along its first axis; a vector or a scalar is one unit.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchclip._core import gather, memory, mesh, operations, rounds, rows
from torchclip._core.collectives import Call, Kind
from torchclip._core.mesh import Layout
from torchclip._core.scalars import ABSENT, norm_dtype


class Units(NamedTuple):
    """This rank's part of a parameter and of its gradient, unit by unit along the first axis."""

    owner: Tensor | None
    """The gradient as the user sees it; None if there is none on this rank."""
    weight: Tensor
    grad: Tensor | None
    measured: Tensor | None
    """The gradient to measure: a reduced copy if a reduction is pending."""
    layout: Layout
    """How single units are split over ranks."""


def of_parameters(some: list[Tensor], items: list[Tensor], given: Any) -> list[Units]:
    """The units of the distinct parameters that have a gradient, here or (if sharded) on other ranks.

    Args:
        some: the parameters.
        items: all parameters of the call; ranks that wait for this one are told of an error.
        given: what the user passed for them.
    """
    try:
        return _of_items(some, items, given)
    except (RuntimeError, TypeError, ValueError):
        gather.tell_ranks([items], None, Kind.ADAPT)
        raise


def parted(items: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The distinct parameters that the kernel may handle, and the others, if there are some of both."""
    some = gather.distinct(items)
    grads = [p.grad for p in some if p.grad is not None]
    if len({id(grad) for grad in grads}) < len(grads):
        return [], items  # one that several parameters share is scaled by the smallest of their coefficients
    plain: list[Tensor] = []
    rest: list[Tensor] = []
    for p in some:
        by_kernel = all(t.is_cpu and memory.is_plain(t) for t in (p, p.grad) if t is not None)
        (plain if by_kernel else rest).append(p)
    return (plain, rest) if rest else ([], items)


def _of_items(some: list[Tensor], items: list[Tensor], given: Any) -> list[Units]:
    chosen = [p for p in gather.distinct(some) if p.grad is not None or mesh.is_dtensor(p)]
    grads = [p.grad for p in chosen if p.grad is not None]
    if not memory.intercepted() and memory.common_dtype([*chosen, *grads]) is not None:
        return [_units(p, p.detach(), grad, grad) for p, grad in zip(chosen, grads, strict=True)]
    held = mesh.locals_of(grads)
    gather.refuse_unwritable(held, items, given)
    place_of = {id(item): place for place, item in enumerate(items)}
    for parameter in chosen:
        _check(place_of[id(parameter)], parameter)
    weights = mesh.locals_of([p.detach() for p in chosen])
    memory.refuse_without_memory(weights, "parameters")
    local = iter(held)
    measured = iter(mesh.locals_of(mesh.without_partial(grads)))
    return [
        _units(p, weight, next(local), next(measured))
        if p.grad is not None
        else _units(p, weight, None, None)
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
    if not mesh.split_alike(grad, parameter):
        raise TypeError(
            f"gradient {i} of shape {tuple(grad.shape)} is not split as its parameter is; redistribute it "
            "(`p.grad = p.grad.redistribute(p.device_mesh, p.placements)`)"
        )


def _units(parameter: Tensor, weight: Tensor, grad: Tensor | None, measured: Tensor | None) -> Units:
    owner = parameter.grad
    if owner is not None and _is_row_sparse(owner):
        values = operations.own_elements(owner)
        return Units(owner, weight[owner.indices()[0]], values, values, mesh.PLAIN)
    if parameter.dim() < 2:
        weight = weight.reshape(1, -1)
        grad = None if grad is None else grad.view(1, -1)
        measured = None if measured is None else measured.reshape(1, -1)
    return Units(owner, weight, grad, measured, mesh.unit_layout(parameter))


def _is_row_sparse(tensor: Tensor) -> bool:
    return tensor.layout == torch.sparse_coo and tensor.sparse_dim() == 1 and tensor.dim() > 1


def norms(units: Sequence[Units], p: float) -> list[tuple[Tensor, Tensor]]:
    """The norms of the weights and of the gradients of each parameter's units.

    If units are split over ranks, the parts on other ranks are included.
    """
    with torch.no_grad():
        of_weights = rows.norms_of_rows([u.weight for u in units], p)
        of_grads = iter(rows.norms_of_rows([u.measured for u in units if u.measured is not None], p))
    if all(u.layout is mesh.PLAIN for u in units):
        return list(zip(of_weights, of_grads, strict=True))
    of_units = []
    by_layout: dict[Layout, list[int]] = {}
    for i, (u, of_weight) in enumerate(zip(units, of_weights, strict=True)):
        of_grad = None if u.measured is None else next(of_grads)
        of_units.append((_or_absent(of_weight, u.weight, u), _or_absent(of_grad, u.measured, u)))
        if u.layout.dims:
            by_layout.setdefault(u.layout, []).append(i)
    vectors = {
        layout: torch.cat([part for i in at for part in of_units[i]]) for layout, at in by_layout.items()
    }
    call = Call(Kind.ADAPT, p)
    joint = rounds.lines(vectors, call)
    call.finish()
    for layout, vector in joint.items():
        at = by_layout[layout]
        lengths = [part.numel() for i in at for part in of_units[i]]
        parts = iter(torch.split(vector.clamp(min=0.0), lengths))
        for i in at:
            of_units[i] = next(parts), next(parts)
    return of_units


def exceeds_range(units: Units, norms: tuple[Tensor, Tensor]) -> bool:
    """Whether a norm of units that only this rank has is infinite where that of scaled units may not be."""
    tensors = [tensor for tensor in (units.weight, units.measured) if tensor is not None]
    if memory.DOUBLE.isdisjoint(tensor.dtype for tensor in tensors) or units.layout.dims:
        return False
    return memory.on_host(norms) and bool(torch.maximum(*norms).isinf().any())


def times(units: Units, factor: float) -> Units:
    """Copies of the numbers to measure, multiplied by a factor."""
    measured = None if units.measured is None else units.measured.detach() * factor
    return units._replace(weight=units.weight * factor, measured=measured)


def _or_absent(norms: Tensor | None, tensor: Tensor | None, units: Units) -> Tensor:
    """The norms of this rank's parts of the units of a tensor; ``ABSENT`` if it has none."""
    if norms is None or tensor is None or (units.layout.dims and tensor.numel() == 0):
        return units.weight.new_full((len(units.weight),), ABSENT, dtype=norm_dtype(units.weight.device))
    return norms


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
                if mesh.is_dtensor(owner) or owner.layout != torch.strided:
                    torch.autograd.graph.increment_version(owner)


def _changed(clip_coefs: Sequence[Tensor]) -> Sequence[bool]:
    """Which of several vectors have a number other than 1; those on a device are not read, and count."""
    if not clip_coefs or not memory.on_host(clip_coefs):
        return [True] * len(clip_coefs)
    starts = list(itertools.accumulate((part.numel() for part in clip_coefs), initial=0))[:-1]
    least = np.minimum.reduceat(torch.cat(list(clip_coefs)).numpy(), starts)  # NaN if any of them is
    answers: list[bool] = (least != 1).tolist()
    return answers
