"""How numbers get from rank to rank, in as few messages as there can be.

All functions take NumPy arrays, whose values can be read, or tensors, for which the host does not wait.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

_MANY = 32
"""The number of ranks with accelerators from which there are two reductions.

They take 4 log₂ N messages in a row, against N - 1 of a gather.
"""
MANY_ON_HOST = 1024
"""Likewise of ranks that communicate from host memory, as over gloo, whose reductions are rings as well."""
ROOTED = 8
"""The number of such ranks from which the first gathers all rows and sends them: fewer messages in a row."""

Array = Any
"""A NumPy array if values can be read, a tensor if the host must not wait for them."""


def are_many(group: dist.ProcessGroup, array: Array) -> bool:
    """Whether the ranks of a group reduce such arrays instead of gathering them."""
    return group.size() >= (MANY_ON_HOST if _tensor(array).is_cpu else _MANY)


def gather(group: dist.ProcessGroup, sent: Array) -> Array:
    """Every rank's array, as the rows of a matrix."""
    tensor = _tensor(sent)
    rows = tensor.new_empty(group.size() * len(tensor))
    if tensor.is_cpu and group.size() >= ROOTED:
        first = dist.get_global_rank(group, 0)
        parts = list(rows.view(-1, len(tensor)).unbind()) if group.rank() == 0 else None
        dist.gather(tensor, parts, first, group)
        dist.broadcast(rows, first, group)
    else:
        # Torch 2.13 renamed it.
        everywhere = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        everywhere(rows, tensor, group=group)
    rows = rows.view(-1, len(tensor))
    return rows if isinstance(sent, Tensor) else rows.numpy()


def reduced(group: dist.ProcessGroup, sent: Array, op: Any) -> Array:
    """The sum or the maximum of all ranks' arrays, in place of this rank's."""
    dist.all_reduce(_tensor(sent), op, group=group)
    return sent


def like(array: Array, other: Any) -> Array:
    """A NumPy array of the same kind as the other one, without waiting."""
    return torch.from_numpy(other).to(array.device, non_blocking=True) if isinstance(array, Tensor) else other


def concatenate(*arrays: Array) -> Array:
    """Arrays of one kind, one after the other."""
    return torch.cat(arrays) if isinstance(arrays[0], Tensor) else np.concatenate(arrays)


def _tensor(array: Array) -> Tensor:
    """The array's memory as a tensor."""
    return array if isinstance(array, Tensor) else torch.from_numpy(array)
