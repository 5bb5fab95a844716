"""Training on several processes: what ``torchclip train`` does differently under ``torchrun``.

Each process (rank) reads its share of the streams of text, and all of them train one model.  Their gradients
are averaged.  The shares have the same size, so the average is the gradient of the whole batch.  In a single
process these functions change nothing.
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
    """Whether ``torchrun``, or a similar launcher, started this process."""
    return "WORLD_SIZE" in os.environ


@contextmanager
def process_group() -> Iterator[None]:
    """Communicate with the other processes within the context."""
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
        dist.barrier()  # no process may be refused and end while another is still joining
        yield
        dist.barrier()  # nor while another still needs it
    finally:
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process at once with an exit status.

    In torch 2.13, threads of gloo may still run after FSDP2, and abort a process that ends normally. torchrun
    would then kill the other processes before they show their results.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def parallelize(model: nn.Module, way: Way | None) -> nn.Module:
    """The model, prepared for training on all ranks; it must have the same weights on each of them.

    Args:
        model: is changed in place by ``"fsdp"``.
        way: with ``"fsdp"`` (FSDP2), each rank has a part of every parameter, gradient and optimizer state;
            with ``"ddp"``, each rank has all of them.  None for a single process.
    """
    if way is None:
        return model
    if way == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    # A single process does not need these modules, which are slow to import.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # In a larger model, each layer would be sharded first, so that they are gathered one by one.
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size(),)))
    return model


def share(streams: Tensor) -> Tensor:
    """This rank's rows; each rank must have the same number."""
    return streams.chunk(world_size())[rank()]


def mean(value: Tensor) -> float:
    """The mean of all ranks' values, with the same result on each rank."""
    total = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item() / world_size()


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """The full state dict of the model, on rank 0; all ranks must call this."""
    if not dist.is_initialized():
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


class CtrlC:
    """Whether Ctrl-C was pressed, so that training can end after a step.

    Several processes must end after the same step, or some would wait for the others forever.  A second
    Ctrl-C interrupts as usual.
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
        """Whether it was pressed on any rank; all ranks must call this, and get the same answer."""
        return mean(torch.tensor(float(self._pressed.is_set()))) > 0
