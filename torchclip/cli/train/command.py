"""The command ``torchclip train``: trains a language model with and without clipping, and compares.

It uses one thread unless ``OMP_NUM_THREADS`` is set.  One is enough for a small model, and the numbers do not
depend on the machine's number of cores.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from torchclip.cli.options import need, refusal
from torchclip.cli.terminal import console_for
from torchclip.cli.train import display, parallel
from torchclip.cli.train.model import model_of, sample, save_model
from torchclip.cli.train.options import Options, add_arguments, with_defaults
from torchclip.cli.train.training import Run, advance, encode, read_text, start_runs

__all__ = ["add_arguments", "run"]


def run(
    text: Path | None,
    only: str | None,
    plot: Path | None,
    html: Path | None,
    save: Path | None,
    way: parallel.Way | None,
    **settings: Any,
) -> int:
    """Train with and without clipping, and show the difference.

    Args:
        text: the file to learn from; by default Python's own documentation.
        only: ``"clipped"`` or ``"unclipped"`` for one run instead of both.
        plot: the file for the picture of loss and gradient norm.
        html: the file for a page about the norms of both runs.
        save: the file for the clipped (or only) model.
        way: how several processes train one model; by default ``"fsdp"``.
        settings: the ``Options``; None as a learning rate or threshold means the default of the cell.

    Returns:
        The exit status: 0, or 130 after Ctrl-C.

    Raises:
        argparse.ArgumentError: if the text or the options cannot be used.
        OSError: if a file cannot be read or written.
    """
    if html is not None:
        need("argument --html:", "jinja2")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    options = with_defaults(**settings)
    characters = read_text(text)
    _check_length(characters, options)
    vocabulary = "".join(sorted(set(characters)))
    tokens = encode(characters, vocabulary)

    with parallel.process_group():
        way = _checked_way(way, options)
        shows = parallel.rank() == 0
        console = console_for(80)
        console.quiet = not shows
        display.introduction(console, options, text, tokens, vocabulary, way)
        runs = _started(only, vocabulary, options, way)
        with display.live_table(console, runs, options):
            interrupted = advance(runs, tokens, options)
        if interrupted:
            display.interruption(console, runs, options)
        weights = [parallel.full_state_dict(run.model) for run in runs]
    if shows:
        models = [model_of(w, vocabulary, options.cell, options.hidden) for w in weights]
        texts = [sample(model, vocabulary, length=400, seed=options.seed) for model in models]
        display.closing_table(console, runs, options, vocabulary)
        display.samples(console, runs, texts)
        if save is not None:
            save_model(save, weights[-1], vocabulary, options)
            display.saved(console, save)
        if plot is not None:
            display.plot(console, runs, plot, options)
        if html is not None:
            display.page(console, runs, html)
    status = 130 if interrupted else 0
    if parallel.launched():
        parallel.leave(status)
    return status


def _started(only: str | None, vocabulary: str, options: Options, way: parallel.Way | None) -> list[Run]:
    try:
        return start_runs(only, vocabulary, options, way)
    except RuntimeError as error:
        if "allocate" not in str(error) and "Storage size" not in str(error):
            raise
        raise refusal(f"a model with --hidden {options.hidden} does not fit into memory") from None


def _check_length(characters: str, options: Options) -> None:
    needed = options.batch * (options.bptt + 1)
    if len(characters) < needed:
        raise refusal(
            f"the text is too short: it has {len(characters):,} characters, and --batch {options.batch} with "
            f"--bptt {options.bptt} needs {needed:,}; pass a longer text or smaller numbers"
        )


def _checked_way(way: parallel.Way | None, options: Options) -> parallel.Way | None:
    """How to train on the launched processes; None in a process that was not launched."""
    if not parallel.launched():
        if way is not None:
            raise refusal(
                f"--parallel {way} needs several processes; start them with: "
                "torchrun --nproc-per-node 2 -m torchclip train"
            )
        return None
    ranks = parallel.world_size()
    if options.batch % ranks:
        raise refusal(
            f"--batch {options.batch} cannot be shared equally by {ranks} processes; "
            f"pass a multiple of {ranks}"
        )
    way = way or "fsdp"
    if way == "fsdp" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        raise refusal(f"FSDP2 on the CPU needs torch 2.7, this is {torch.__version__}; pass --parallel ddp")
    return way
