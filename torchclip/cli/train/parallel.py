"""One training on several processes: what ``torchclip train`` does differently where ``torchrun`` started it.

Each process (rank) reads its share of the streams of text, and all of them train one model: their gradients
are averaged, which makes them those of the whole batch, as the shares are equally large.  In a process that
is alone these functions change nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchclip.cli.options import refusal

Way = Literal["fsdp", "ddp"]


def launched() -> bool:
    """Whether ``torchrun``, or something like it, started this process, perhaps beside others."""
    return "WORLD_SIZE" in os.environ


@contextmanager
def process_group() -> Iterator[None]:
    """Talk to the other processes while the context lasts."""
    if not launched():
        yield
        return
    try:
        dist.init_process_group("gloo")
    except (ValueError, RuntimeError) as error:
        raise refusal(
            f"WORLD_SIZE is set, but this process cannot join others: {error}; start them with torchrun, "
            "or unset WORLD_SIZE to train in one process"
        ) from None
    try:
        dist.barrier()  # nobody may be refused, and leave, while another is still joining
        yield
        dist.barrier()  # nor while another still needs it
    finally:
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process at once, with an exit status.

    In torch 2.13 threads of gloo's may be left after FSDP2, and abort a process that ends as usual; torchrun
    would then kill the others, whatever they were about to show.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def parallelize(model: nn.Module, way: Way | None) -> nn.Module:
    """The model, trained by all ranks from now on; it must have the same weights on each of them.

    Args:
        model: is changed in place by ``"fsdp"``.
        way: ``"fsdp"`` (FSDP2) leaves each rank a part of every parameter, gradient and optimizer state;
            with ``"ddp"`` each has all of them.  None is for a process that is alone.
    """
    if way is None:
        return model
    if way == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    # These modules are not needed, and take long to import, in a process that is alone.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # A larger model would have its layers sharded first, to be gathered one after another.
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size(),)))
    return model


def share(streams: Tensor) -> Tensor:
    """This rank's rows, of which there must be equally many for each."""
    return streams.chunk(world_size())[rank()]


def mean(value: Tensor) -> float:
    """The mean of all ranks' values, the same number on each of them."""
    total = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item() / world_size()


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict of the model as it was before ``parallelize``; on rank 0, while all ranks call this."""
    if not dist.is_initialized():
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


class CtrlC:
    """Whether Ctrl-C was pressed: instead of breaking off anywhere, a training can end after a step.

    Several processes must all end after the same one, or those that go on would wait for the others for
    ever.  The second time Ctrl-C breaks off as usual.
    """

    def __init__(self) -> None:
        self._pressed = Event()

    def __enter__(self) -> CtrlC:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, *_: object) -> None:
        self._pressed.set()
        signal.signal(signal.SIGINT, self._before)

    def on_any_rank(self) -> bool:
        """Whether it was pressed on any rank; all ranks must ask, and get the same answer."""
        return mean(torch.tensor(float(self._pressed.is_set()))) > 0
