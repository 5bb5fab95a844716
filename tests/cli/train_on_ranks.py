"""Trains small models; run on several ranks, the first of which prints the numbers as JSON."""

import json
import sys
from typing import Any, get_args

import torch.distributed as dist

from torchclip.cli.train import parallel, training
from torchclip.cli.train.options import Options

MODEL: dict[str, Any] = {
    "cell": "rnn",
    "hidden": 8,
    "batch": 4,
    "bptt": 10,
    "seed": 0,
    "lr": 3.0,
    "warmup": 1,
    "threshold": "fixed",
    "max_norm": 0.5,
}


def trained(
    steps: int = 6, only: str | None = None, way: parallel.Way | None = None, **changes: Any
) -> list[training.Run]:
    """Finished runs on the default text."""
    text = training.read_text(None)
    options = Options(steps=steps, **{**MODEL, **changes})
    vocabulary = "".join(sorted(set(text)))
    runs = training.start_runs(only, vocabulary, options, way)
    training.advance(runs, training.encode(text, vocabulary), options)
    return runs


def numbers(cell: str, threshold: str, way: parallel.Way | None = None) -> dict[str, Any]:
    """Steps and final weights of both runs."""
    runs = trained(steps=20, hidden=16, cell=cell, lr=1.0, threshold=threshold, max_norm=0.4, way=way)
    weights = [parallel.full_state_dict(run.model) for run in runs]
    return {
        "steps": [list(run.history) for run in runs],
        "weights": [{name: value.tolist() for name, value in w.items()} for w in weights],
    }


def report(cell: str, threshold: str) -> dict[str, Any]:
    """The same training in both ways, and what the processes are."""
    ways = {way: numbers(cell, threshold, way) for way in get_args(parallel.Way)}
    steps: list[Any] = [None] * parallel.world_size()
    dist.all_gather_object(steps, [ways[way]["steps"] for way in ways])
    assert all(each == steps[0] for each in steps), "the ranks disagree"
    return {"ways": ways, "ranks": parallel.world_size()}


if __name__ == "__main__":
    with parallel.process_group():
        cases = (case.split(",") for case in sys.argv[1:])
        result = [report(cell, threshold) for cell, threshold in cases]
        if parallel.rank() == 0:
            print(json.dumps(result))
    parallel.leave(0)
