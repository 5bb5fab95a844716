"""From a call's argument to a batch: this file alone decides what handles which tensor.

tensors that are …                                               are handled by
---------------------------------------------------------------  ---------------------------
all plain, without gaps, in host memory, of the kernel's dtypes  native (if the kernel is on)
anything else, or traced or intercepted                          operations
any of them a DTensor, or in a call with ``group``               sharded, over one of the above
"""

from __future__ import annotations

import types
import warnings
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torchclip._core import arguments, memory, native
from torchclip._core.batch import Batch, Norm, Norms
from torchclip._core.operations import TorchBatch
from torchclip._core.ranks import meshes, sharded
from torchclip._core.ranks.exchange import Kind
from torchclip._core.ranks.sharded import ShardedBatch


def gradients(
    parameters: Tensor | Iterable[Tensor] | nn.Module, group: Any = None, kind: str | None = None
) -> Batch:
    """The distinct gradients of the parameters that have one, in order, to be changed in place.

    Raises for gradients that cannot be changed.

    Args:
        parameters: the parameters.
        group: the process groups whose ranks hold further gradients, or None.
        kind: of ``Kind``, if ranks take norms together afterwards; waiting ranks learn of a
            refusal.
    """
    if group is None and type(parameters) is list:
        batch = _by_kernel(parameters, take_grad=True)
        if batch is not None and batch.all:  # nearly always: then there is nothing to refuse
            return cast("Batch", batch)
    (found,) = _batches("parameters", [parameters], group, kind)
    return found


def measured(
    parameters: Sequence[Sequence[Tensor]], group: Any, each: bool, p: float
) -> list[tuple[Batch, Norm | Norms]]:
    """``gradients`` of several lists of parameters, with the norm of each, or with ``each`` of its tensors.

    Ranks exchange all norms at once.
    """
    found: list[tuple[Batch, Norm | Norms]] = []
    if group is None:
        for some in parameters:
            both = native.measured(some, p, each)
            if both is None:
                break
            found.append(both)
        else:  # nearly always: then there is nothing to refuse, and no other rank
            return found
    batches = _batches("parameters", parameters, group, Kind.CLIP_EACH if each else Kind.CLIP)
    return [*zip(batches, norms_of(batches, each, p), strict=True)]


def tensors(tensors: Tensor | Iterable[Tensor], group: Any = None, kind: str | None = Kind.MEASURE) -> Batch:
    """The distinct tensors of an argument named ``tensors``, to be measured; as for ``gradients``."""
    (batch,) = _batches("tensors", [tensors], group, kind)
    return batch


def tell_ranks(several: Sequence[Any], group: Any, kind: str | None) -> None:
    """Tell the ranks that wait for this one that it refused its gradients or an argument.

    Otherwise they would pair their call with the next one of this rank.

    Args:
        several: the arguments with parameters or tensors: with ``group``, they show which ranks wait.
        group: the argument of that name.
        kind: of ``Kind``; None for a call without other ranks.
    """
    if kind is None or not meshes.has_ranks():
        return
    try:
        groups = meshes.as_groups(group)
    except TypeError:
        return  # it does not involve other ranks
    sharded.tell_refusal([_tensors_in(some, kind) for some in several], groups, kind)


def _tensors_in(argument: Any, kind: str) -> list[Tensor]:
    """The tensors of an argument that may be wrong; none if it cannot be read."""
    try:
        items = arguments.tensor_list("tensors" if kind == Kind.MEASURE else "parameters", argument)
    except Exception:  # of user code, and already on its way to the user
        return []
    return [item for item in items if isinstance(item, Tensor)]


def norms_of(batches: Sequence[Batch], each: bool, p: float) -> list[Norm | Norms]:
    """The norm of each batch, or with ``each`` the norms of its tensors, in one exchange between ranks."""
    together = [batch for batch in batches if isinstance(batch, ShardedBatch)]
    joint = iter(sharded.norms_of(together, each, p) if together else ())
    return [
        next(joint) if isinstance(batch, ShardedBatch) else (batch.norms if each else batch.norm)(p)
        for batch in batches
    ]


def zero_nonfinite_(batches: Sequence[Batch], several: Sequence[Any], group: Any, kind: str) -> None:
    """Set every infinite or NaN element of some batches to 0 in place, before ranks take their norms.

    Raises before any batch is changed, and then tells the waiting ranks.

    Args:
        batches: the batches.
        several: the parameters of each of them.
        group: the argument of that name.
        kind: of ``Kind``: that of the norms.
    """
    try:
        for batch in batches:
            if isinstance(batch, ShardedBatch):
                batch.check_not_pending("zeroing non-finite elements")
    except TypeError:
        tell_ranks(several, group, kind)
        raise
    for batch in batches:
        batch.zero_nonfinite_()


def local_gradients(parameters: Iterable[Tensor]) -> Batch:
    """This rank's part of the parameters' gradients: its norms need no other rank."""
    found, shared = _found(arguments.tensor_list("parameters", parameters), "parameters")
    return _local(meshes.locals_of(found), shared)


def fingerprint(parameters: Sequence[Tensor]) -> bytes:
    """Eight bytes for each of the ``distinct_gradients``, others if it was replaced or changed since.

    They depend on the address, the version counter, and, in host memory, on one element that is neither 0
    nor infinite nor NaN if there is one: new gradients often have the addresses and versions of old ones, and
    ``GradScaler.unscale_`` changes no version.  They are those of this rank's parts.
    """
    found = native.fingerprint(parameters)
    if found is None:  # one by one, as those that the kernel takes must not depend on the others
        owners = {id(p.grad): p for p in parameters if p.grad is not None}
        found = b"".join(native.fingerprint([p]) or _fingerprint_of(p.grad) for p in owners.values())
    return found


def _fingerprint_of(grad: Any) -> bytes:
    (held,) = meshes.locals_of([grad])
    signs = id(held), meshes.version_of(grad), *memory.signs_of_change(held)
    return array("q", [hash(signs)]).tobytes()


def warn_if_used_up(parameters: Any) -> None:
    """Give torch's warning for a generator without items, which usually was used up before."""
    if isinstance(parameters, types.GeneratorType):
        message = "`parameters` is an empty generator, no gradient clipping will occur."
        warnings.warn(message, stacklevel=arguments.level_of_caller())


def distinct(items: Sequence[Tensor], name: str = "parameters") -> list[Tensor]:
    """The distinct items of an argument; raises for anything but a tensor."""
    # All at once unless it is traced, which torch.compile of torch 2.6 cannot do.
    if is_dynamo_compiling() or not all(issubclass(kind, Tensor) for kind in set(map(type, items))):
        for i, item in enumerate(items):
            arguments.check_tensor(name, i, item)
    return _once(items)


def distinct_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The distinct gradients of the parameters that have one, in order."""
    return _once(_present(parameters))


def check_writable(held: Iterable[Tensor], items: Sequence[Tensor], given: Any) -> None:
    """Raise an error for gradients that cannot be changed in place, before any is.

    Args:
        held: this rank's parts of them.
        items: the parameters.
        given: what the user passed for them.
    """

    def described(gradient: Tensor) -> str:
        grads = [item if item.grad is None else item.grad for item in items]
        place = next((i for i, each in enumerate(meshes.locals_of(grads)) if each is gradient), None)
        name = None if place is None else arguments.names_of(given).get(id(grads[place]))
        item = name or ("an item" if place is None else f"item {place}")
        return f"{item} of `parameters` has a gradient of shape {tuple(gradient.shape)}"

    memory.check_writable(held, described)


def _found(items: Sequence[Tensor], name: str) -> tuple[list[Tensor], bool]:
    """The distinct tensors among the items of an argument, or (of one named "parameters") their gradients.

    Returns:
        The tensors, and whether any is the gradient of several items.
    """
    different = distinct(items, name)
    if name != "parameters":
        return different, False
    present = _present(different)
    found = _once(present)
    return found, len(found) < len(present)


def _present(parameters: Iterable[Tensor]) -> list[Tensor]:
    grads = [parameter.grad for parameter in parameters]
    return [grad for grad in grads if grad is not None]


def _once(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _batches(name: str, several: Sequence[Any], group: Any, kind: str | None) -> list[Batch]:
    lists: list[Any] = list(several)
    try:
        for i, given in enumerate(several):
            lists[i] = arguments.tensor_list(name, given)
        return [_batch(lists[i], name, group, given, kind) for i, given in enumerate(several)]
    except Exception:
        tell_ranks(lists, group, kind)
        raise


def _batch(items: list[Tensor], name: str, group: Any, given: Any, kind: str | None) -> Batch:
    take_grad = name == "parameters"
    if take_grad and not items:
        warn_if_used_up(given)
    batch: Batch
    # A parameter without a gradient here may have one on another rank, which then waits for this one.
    groups = meshes.as_groups(group)
    if groups or meshes.any_dtensor(items):
        measured = kind in (Kind.MEASURE, Kind.MEASURE_EACH)
        batch = ShardedBatch(distinct(items, name), take_grad, groups, _local, measured, given)
    elif (by_kernel := _by_kernel(items, take_grad)) is not None:
        batch = by_kernel
    else:
        batch = _local(*_found(items, name))
    if batch.rest and take_grad:
        check_writable(batch.rest, items, given)
    elif batch.rest:
        memory.check_has_memory(meshes.locals_of(items), "tensors")
    if batch.rest and kind is not None:
        _check_values(batch.rest, batch.all)
    if take_grad and not batch.all:
        warn_of_gradients(items)
    return batch


def _by_kernel(items: Sequence[Tensor], take_grad: bool = False) -> Any:
    """The kernel's batch of tensors, or of their gradients; None if it does not take all of them."""
    if is_dynamo_compiling():
        return None
    return native.gradients(items) if take_grad else native.tensors(items)


def warn_of_gradients(items: Sequence[Tensor]) -> None:
    """Warn where gradients seem to be passed in place of their parameters, so that nothing is clipped.

    A frozen model has parameters, too, which is why a single ``nn.Parameter`` shows that nothing is wrong.
    """

    def is_meant(item: Tensor) -> bool:
        return item.requires_grad or item.grad is not None or isinstance(item, nn.Parameter)

    if items and not any(map(is_meant, items)):
        message = (
            "None of the tensors in `parameters` requires a gradient or has one, so nothing is clipped. Pass "
            "the parameters themselves, not their gradients."
        )
        warnings.warn(message, stacklevel=arguments.level_of_caller())


def _check_values(held: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Raise an error for tensors without values among others: they have no norm together."""
    on_meta = [tensor for tensor in held if tensor.is_meta]
    if not on_meta or all(tensor.is_meta for tensor in tensors):
        return
    place = next(place for place, tensor in enumerate(tensors) if tensor.is_meta)
    raise TypeError(
        f"gradient {place} of shape {tuple(tensors[place].shape)} is on the device 'meta' and has no values, "
        "but other gradients have; move its parameter to a device that has values "
        "(`module.to_empty(device=...)`), or set the gradient to None (`p.grad = None`)"
    )


def _local(tensors: list[Tensor], shared: bool = False) -> Batch:
    """The batch of distinct tensors of which no other rank has a part.

    Args:
        tensors: the tensors.
        shared: whether any is known to be the gradient of several parameters.
    """
    # The kernel's batch of tensors does not say that parameters share a gradient.
    by_kernel = None if shared else _by_kernel(tensors)
    if by_kernel is not None:
        return cast("Batch", by_kernel)
    dtype = None if memory.intercepted() else memory.common_dtype(tensors)
    return TorchBatch(tensors, shared, dtype)
