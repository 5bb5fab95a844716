"""What torch's function and torchclip's add to a step of fused AdamW whose gradients are clipped.

    python benchmarks/clip_and_step.py [--only gpt2] [--json FILE]

Everything runs in one process on the same parameters, whose gradients are restored before every call.  Each
round takes one step in every way, so that disturbances affect all of them.  It prints medians over the
rounds.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from contenders import Gradients
from torch import Tensor
from turns import options_of, print_machine, take_turns, write_results
from workloads import WORKLOADS

import torchclip

ROUNDS = {"two-3x3": 1001, "ppo": 1001, "1000x64": 301, "gpt2": 15}
WARM_UP = 3


_OURS = "torchclip.clip_grad_norm_"


def ways(parameters: Sequence[Tensor], max_norm: float) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def after(clip: Callable[..., Any]) -> Callable[[], object]:
        return lambda: (clip(parameters, max_norm), optimizer.step())

    return {
        "step": optimizer.step,
        "torch": after(torch.nn.utils.clip_grad_norm_),
        _OURS: after(torchclip.clip_grad_norm_),
    }


def measure(name: str) -> dict[str, Any]:
    """The median seconds of each way, and how many times faster than torch torchclip is."""
    gradients = Gradients(WORKLOADS[name])
    for parameter in gradients.parameters:
        parameter.data.zero_()
    contenders = ways(gradients.parameters, gradients.norm / 2)

    def turn(way: str) -> float:
        gradients.restore()
        start = perf_counter()
        contenders[way]()
        return perf_counter() - start

    turns = {way: partial(turn, way) for way in contenders}
    take_turns(turns, WARM_UP)
    times = take_turns(turns, ROUNDS[name])
    medians = {way: median(of_way) for way, of_way in times.items()}
    added = {way: seconds - medians["step"] for way, seconds in medians.items()}
    return {
        "workload": name,
        "seconds": medians,
        "speedup": median(
            t / c for t, c in zip(times["torch"], times["torchclip.clip_grad_norm_"], strict=True)
        ),
        "added_share": added["torchclip.clip_grad_norm_"] / added["torch"],
    }


def main() -> None:
    """Measure and print."""
    parser = options_of(__doc__)
    parser.add_argument("--only", action="append", choices=ROUNDS, help="a workload")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    arguments = parser.parse_args()
    print_machine()
    rows = []
    for name in arguments.only or ROUNDS:
        row = measure(name)
        rows.append(row)
        print(f"\n{WORKLOADS[name].title}")
        for way, seconds in row["seconds"].items():
            print(f"  {way:<28}{seconds * 1e6:>14,.1f} µs")
        print(
            f"  torchclip: {row['speedup']:.2f} x torch's speed, {row['added_share']:.0%} of its added cost"
        )
    if arguments.json:
        write_results(arguments.json, rows)


if __name__ == "__main__":
    main()
