"""What recording by `torchclip run` adds to a step: it is switched on and off at random in one process.

    python benchmarks/recording.py [--steps N]

The model is the MLP 17-64-64-6 with Adam, batches of 64, on one thread.  A step is everything from
zero_grad() to step().  It prints the share of recording by lower quartiles, and by means without the slowest
5 %.
"""

import random
from statistics import fmean, quantiles
from time import perf_counter

import torch
from steps import new_model
from turns import options_of, without_garbage_collection

from torchclip.cli.run.calls import Calls
from torchclip.cli.run.losses import LossRecorder
from torchclip.cli.run.steps import StepRecorder
from torchclip.cli.run.trial import Trial

WARM_UP = 200


def main() -> None:
    """Measure, and print both shares."""
    parser = options_of(__doc__)
    parser.add_argument("--steps", type=int, default=8000, help="(default: 8000)")
    with without_garbage_collection():
        off, on = measure(parser.parse_args().steps)
    for name, of in {"lower quartile": lower_quartile, "mean": mean}.items():
        added, step = of(on) - of(off), of(off)
        print(f"{name}: {1e6 * added:.1f} µs added to {1e6 * step:.1f} µs, {added / step:.1%}")


def measure(steps: int) -> tuple[list[float], list[float]]:
    """The seconds of the steps that were not recorded, and of those that were."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, inputs = new_model("mlp"), torch.randn(64, 17)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    losses, draw = LossRecorder(), random.Random(0)
    recorder = StepRecorder(Trial(), Calls(), losses)
    times: tuple[list[float], list[float]] = ([], [])
    for step in range(WARM_UP + steps):
        recorded = draw.random() < 0.5
        for each in (recorder, losses):  # in both cases, as it affects the caches
            each.attach()
            if not recorded:
                each.detach()
        start = perf_counter()
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        seconds = perf_counter() - start
        recorder.detach()
        losses.detach()
        if step >= WARM_UP:
            times[recorded].append(seconds)
    return times


def lower_quartile(times: list[float]) -> float:
    """The lower quartile."""
    return quantiles(times, n=4)[0]


def mean(times: list[float]) -> float:
    """The mean without the slowest 5 %, in which the machine did something else."""
    return fmean(sorted(times)[: round(0.95 * len(times))])


if __name__ == "__main__":
    main()
