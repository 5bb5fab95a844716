"""Runs checks on several ranks: real processes that talk over gloo, on this machine, without ports.

A check is a function whose name starts with ``check_``.  All ranks run it together, in a process group of its
own: a check that fails, or leaves the ranks in disorder, does not touch the next one.  The processes live as
long as a :class:`Ranks`, which is a session of pytest; they are forked from one that has imported torch.
"""

import faulthandler
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

RANKS = 4
# The largest world of any check.
PROCESSES = 5
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
FSDP2 = TORCH >= (2, 7)
# Gloo gives up waiting for a rank that has failed after this time.
PATIENCE = timedelta(seconds=30)
DEADLINE = 120.0
# Imported only once, before the ranks are forked.
PRELOADED = [*(path.stem for path in Path(__file__).parents[1].rglob("*_checks.py")), "torch._dynamo"]
Check = Callable[[], None]


def torchrun(processes: int) -> tuple[str, ...]:
    """Runs a script or a module on some processes, which find each other through a port that is free."""
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")


TORCHRUN = torchrun(2)


def world_of(ranks: int) -> Callable[[Check], Check]:
    """Marks a check for a world of this many ranks; in an unmarked check all ranks take part."""

    def mark(check: Check) -> Check:
        vars(check)["ranks"] = ranks
        return check

    return mark


def since_2_7(check: Check) -> Check:
    """Marks a check that torch 2.6 cannot run on the CPU."""
    vars(check)["since_2_7"] = True
    return check


def checks_of(*modules: ModuleType) -> list[Any]:
    """The checks, as parameters of a test."""
    skip = pytest.mark.skipif(not FSDP2, reason="on the CPU torch 2.6 has no FSDP2, averages and bfloat16")
    return [
        pytest.param(check, id=name, marks=[skip] if hasattr(check, "since_2_7") else [])
        for module in modules
        for name, check in vars(module).items()
        if name.startswith("check_")
    ]


class Ranks:
    """Processes that run checks together.

    Args:
        folder: an empty one, for the files by which the ranks find each other, and for what they print.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = count()
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(self, check: Check, with_kernel: bool) -> None:
        """Run a check; fails with the errors of all ranks."""
        if not self._processes:
            self._start()
        order = check, with_kernel, self._folder / f"store-{next(self._number)}"
        for connection in self._connections:
            connection.send(order)
        deadline = time.monotonic() + DEADLINE
        errors = [self._answer(rank, deadline) for rank in range(PROCESSES)]
        if None in errors:
            self.stop()
        shown = [
            f"rank {rank}:\n{self._output(rank).read_text() if error is None else error}"
            for rank, error in enumerate(errors)
            if error != ""
        ]
        if shown:
            pytest.fail("\n".join(shown), pytrace=False)

    def stop(self) -> None:
        """End the processes; the next check starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        forks = "forkserver" in get_all_start_methods()
        context: Any = get_context("forkserver" if forks else "spawn")
        if forks:
            context.set_forkserver_preload(PRELOADED)
        for rank in range(PROCESSES):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs, self._output(rank)), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _answer(self, rank: int, deadline: float) -> str | None:
        """The error of a rank, or ""; None if it does not answer."""
        connection = self._connections[rank]
        try:
            if connection.poll(max(0.0, deadline - time.monotonic())):
                return str(connection.recv())
        except EOFError:  # the process has ended
            pass
        return None

    def _output(self, rank: int) -> Path:
        return self._folder / f"output-{rank}.txt"


def _serve(rank: int, connection: Connection, output: Path) -> None:
    """Run the checks that the session asks for, until it ends."""
    import torch

    with output.open("w") as file:
        for printed in (1, 2):
            os.dup2(file.fileno(), printed)
    torch.set_num_threads(1)
    while True:
        try:
            check, with_kernel, store = connection.recv()
        except EOFError:
            return
        # The test then shows where a check hangs.
        faulthandler.dump_traceback_later(DEADLINE - 1, file=2)
        connection.send(_run(check, with_kernel, rank, store))
        faulthandler.cancel_dump_traceback_later()


def _run(check: Check, with_kernel: bool, rank: int, store: Path) -> str:
    """The error, or ""."""
    import torch.distributed as dist

    from torchclip import kernel

    ranks = getattr(check, "ranks", RANKS)
    if rank >= ranks:
        return ""
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(store), ranks),
            rank=rank,
            world_size=ranks,
            timeout=PATIENCE,
        )
        if with_kernel:
            check()
        else:
            with kernel.disabled():
                check()
        # No rank may leave while another one still needs it.
        dist.barrier()
    except BaseException:
        return traceback.format_exc()
    finally:
        if TORCH < (2, 7):
            time.sleep(0.05)  # destroying the group holds the GIL, which gloo's threads may still need
        if dist.is_initialized():
            dist.destroy_process_group()
    return ""
