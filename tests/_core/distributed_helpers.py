"""Runs checks on several ranks: real processes that talk over gloo, on this machine, without ports.

``python distributed_helpers.py MODULE RANK FOLDER`` is one of the processes.  It runs every function of
MODULE whose name starts with ``check_``, with the kernel and without, each in a process group of its own: a
check that fails, or leaves the ranks in disorder, does not touch the next one.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import ModuleType

RANKS = 4
# Gloo gives up waiting for a rank that has failed after this time.
PATIENCE = timedelta(seconds=30)
DEADLINE = 300.0
MODES = ["kernel", "torch operations"]
Check = Callable[[], None]


def worlds_of(ranks: int) -> Callable[[Check], Check]:
    """Marks a check to be run in worlds of this many ranks; without it, in one of all."""

    def mark(check: Check) -> Check:
        vars(check)["ranks"] = ranks
        return check

    return mark


def checks_of(module: ModuleType) -> list[str]:
    return [name for name in vars(module) if name.startswith("check_")]


def run_on_ranks(module: str, folder: Path) -> dict[tuple[str, str], list[str]]:
    """What went wrong on any rank, by check and mode; nothing for those that passed."""
    processes = [_start(module, rank, folder) for rank in range(RANKS)]
    deadline = time.monotonic() + DEADLINE
    try:
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass  # what is missing in the ranks' reports is told below
    finally:
        for process in processes:
            process.kill()
            process.wait()
    errors: dict[tuple[str, str], list[str]] = {}
    for rank in range(RANKS):
        lines = _report(folder, rank).read_text().splitlines() if _report(folder, rank).exists() else []
        outcome = {(check, mode): error for check, mode, error in map(json.loads, lines)}
        for check in checks_of(import_module(module)):
            for mode in MODES:
                error = outcome.get((check, mode), f"did not run:\n{_output(folder, rank).read_text()}")
                if error:
                    errors.setdefault((check, mode), []).append(f"rank {rank}:\n{error}")
    return errors


def _start(module: str, rank: int, folder: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH")]))
    with _output(folder, rank).open("w") as output:
        return subprocess.Popen(
            [sys.executable, __file__, module, str(rank), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _output(folder: Path, rank: int) -> Path:
    return folder / f"output-{rank}.txt"


def _report(folder: Path, rank: int) -> Path:
    return folder / f"report-{rank}.jsonl"


def _run_rank(module: ModuleType, rank: int, folder: Path) -> None:
    from torchclip import kernel

    for check in checks_of(module):
        for mode in MODES:
            if mode == MODES[0]:
                error = _run_check(getattr(module, check), rank, folder / f"{check}-{mode}")
            else:
                with kernel.disabled():
                    error = _run_check(getattr(module, check), rank, folder / f"{check}-{mode}")
            with _report(folder, rank).open("a") as report:
                print(json.dumps([check, mode, error]), file=report)


def _run_check(check: Check, rank: int, store: Path) -> str:
    import torch.distributed as dist

    ranks = getattr(check, "ranks", RANKS)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(f"{store}-{rank // ranks}", ranks),
            rank=rank % ranks,
            world_size=ranks,
            timeout=PATIENCE,
        )
        check()
        # Nobody may leave while another still needs it.
        dist.barrier()
    except BaseException:
        return traceback.format_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return ""


if __name__ == "__main__":
    _run_rank(import_module(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
