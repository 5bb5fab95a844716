"""The command ``torchclip bench``: how fast and how exact clipping is on this machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

import torch

from torchclip.cli import info
from torchclip.cli.bench.contenders import OPERATIONS, RIVALS
from torchclip.cli.bench.figure import benchmark_figure, scaling_figure
from torchclip.cli.bench.loop import ROUNDS, measure_steps
from torchclip.cli.bench.rules import SECONDS, measure_rules
from torchclip.cli.bench.table import call_tables, in_short, notes, rule_table, show, step_tables
from torchclip.cli.bench.timing import FULL, QUICK, measure
from torchclip.cli.bench.workloads import SCALING, WORKLOADS
from torchclip.cli.figures import save
from torchclip.cli.options import file_to_write, picture_file, refusal, writing
from torchclip.cli.terminal import console_for, tell_file

__all__ = ["add_arguments", "machine", "run"]

WIDTH = 140  # of the tables, without a terminal
STEPS = "steps"  # the name of the measurement in training steps for --only
OTHER_RULES = "rules"  # the name for the rules other than clipping by norm and by value
QUICK_ROUNDS = 40  # in training steps, with --quick
QUICK_SECONDS = 0.1  # for a row of the rules, with --quick


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``torchclip bench``."""
    add = parser.add_argument
    add(
        "--only",
        metavar="WORKLOAD",
        action="append",
        choices=[STEPS, OTHER_RULES, *WORKLOADS],
        help=f"measure this only; may be repeated: {STEPS} (in training), {OTHER_RULES} (AGC, per example, "
        f"RMS, per parameter), {', '.join(WORKLOADS)}",
    )
    add(
        "--scaling",
        action="store_true",
        help="measure 10 to 100,000 gradients and 1 KiB to 2 GiB instead; needs 8 GiB",
    )
    add("--quick", action="store_true", help="a first look: three rounds, without torch.compile")
    add(
        "--device",
        metavar="DEVICE",
        type=_device,
        default="cpu",
        help="where the gradients are, such as cuda or cuda:1 (default: %(default)s)",
    )
    add("--json", dest="results", metavar="FILE", type=file_to_write, help="write the results as JSON")
    add("--plot", dest="picture", metavar="FILE", type=picture_file, help="draw them (PNG, SVG or PDF)")


def run(
    only: list[str] | None,
    scaling: bool,
    quick: bool,
    device: torch.device,
    results: Path | None,
    picture: Path | None,
) -> None:
    """Measure, and show the tables."""
    if only and scaling:
        raise refusal("--only and --scaling do not go together")
    console = console_for(WIDTH)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH
    facts = machine()
    if device.type != "cpu":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        facts["gradients on"] = f"{device}, {name}"
    console.print("\n".join(f"{name:<18} {value}" for name, value in facts.items()), highlight=False)

    # For --scaling, torch.compile would take hours, and optax would need memory for two more copies.
    rivals = [] if scaling else ["optax"] if quick else RIVALS
    workloads = SCALING if scaling else {n: w for n, w in WORKLOADS.items() if n in (only or WORKLOADS)}
    others = (only or [STEPS, OTHER_RULES]) if device.type == "cpu" and not scaling else []
    steps = measure_steps(QUICK_ROUNDS if quick else ROUNDS) if STEPS in others else []
    rules = measure_rules(QUICK_SECONDS if quick else SECONDS) if OTHER_RULES in others else []
    rows = measure(workloads, QUICK if quick else FULL, rivals, device)
    tables = [*step_tables(steps), rule_table(rules), *call_tables(rows), in_short(steps, rows)]
    for table in tables:
        if table.rows:
            show(table, console)
    for note in notes(steps, rows, tables, rules):
        console.print(note, markup=False, highlight=False)
    if results:
        with writing(results):
            report = {"machine": facts, "quick": quick, "steps": steps, "rules": rules, "rows": rows}
            results.write_text(json.dumps(report, indent=1) + "\n")
        tell_file(console, "Results", results)
    if picture:
        save(scaling_figure(rows) if scaling else benchmark_figure(rows, OPERATIONS, steps), picture)
        tell_file(console, "Picture", picture)


def _device(text: str) -> torch.device:
    """A device of this machine."""
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here ({reason})") from None
    if device.type == "meta":
        raise argparse.ArgumentTypeError("nothing is computed on the device 'meta'; choose cpu or cuda")
    return device


def machine() -> dict[str, str]:
    """Facts about the machine on which the numbers depend."""
    return {
        "CPU": _cpu_model(),
        "cores": str(os.cpu_count()),
        "load average": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown",
        **info.facts(),
        "jax": info.installed_version("jax"),
        "optax": info.installed_version("optax"),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
