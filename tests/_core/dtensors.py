"""DTensors for the checks on ranks."""

import inspect
from collections.abc import Sequence

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor

__all__ = ["placed"]


def placed(full: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A DTensor of this value, which all ranks have: nothing is exchanged."""
    if "src_data_rank" in inspect.signature(distribute_tensor).parameters:  # since torch 2.7
        return distribute_tensor(full.clone(), mesh, placements, src_data_rank=None)
    held = full
    here = mesh.get_coordinate()
    for dim, placement in enumerate(placements):
        if here is not None and isinstance(placement, Shard):
            parts, _ = placement._split_tensor(held, mesh.size(dim), with_padding=False, contiguous=True)
            held = parts[here[dim]]
    return DTensor.from_local(
        held.clone(), mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
    )
