"""How ``torchclip bench`` measures single calls: warm, with ratios that are taken within a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import torch

from torchclip.cli.bench.contenders import OPERATIONS, RIVALS, Contender, Gradients, contenders, floors
from torchclip.cli.bench.rounds import progress, quartiles, take_turns
from torchclip.cli.bench.workloads import Workload

__all__ = ["FULL", "QUICK", "Effort", "Row", "Timer", "compare", "measure", "second_arguments", "summary"]

SHRINK = 0.98  # the threshold shrinks from call to call, so that every call clips, even in bfloat16
MOST_CALLS = 200  # in a sample; twice as many shrink gradients to 0.03 %, which loses no digits

CPU = torch.device("cpu")

Row = dict[str, Any]


class Effort(NamedTuple):
    """How long to measure.

    Attributes:
        sample_seconds: how long each timing repeats the call.
        row_seconds: how long further rounds are started.
        rounds: the smallest and the largest number of rounds.
    """

    sample_seconds: float
    row_seconds: float
    rounds: tuple[int, int]


FULL = Effort(sample_seconds=2e-3, row_seconds=3.0, rounds=(15, 101))
QUICK = Effort(sample_seconds=5e-4, row_seconds=0.0, rounds=(3, 3))


def measure(
    workloads: Mapping[str, Workload],
    effort: Effort,
    rivals: Sequence[str],
    device: torch.device = CPU,
) -> list[Row]:
    """A row for each workload and operation.

    Args:
        workloads: by name.
        effort: how long to measure each row.
        rivals: which of ``torch.compile`` and ``optax`` take part; optax only if it is installed.
        device: where the gradients are.
    """
    rows = []
    with progress(len(workloads) * len(OPERATIONS)) as begin:
        for name, workload in workloads.items():
            gradients = Gradients(workload, device)
            others = contenders(gradients, rivals)
            for operation, title in OPERATIONS.items():
                begin(f"{workload.title}: {title}")
                of = {"workload": name, "title": workload.title, "operation": operation}
                size = {
                    "tensors": len(workload.shapes),
                    "elements": workload.elements,
                    "bytes": workload.bytes,
                }
                rows.append({**of, **size, **compare(gradients, operation, others, effort)})
    return rows


def compare(
    gradients: Gradients, operation: str, contenders: Mapping[str, Contender], effort: Effort
) -> dict[str, Any]:
    """Time one operation in all contenders, round by round, and the memory traffic alone.

    Args:
        gradients: the gradients to clip.
        operation: a key of ``OPERATIONS``.
        contenders: by name, including ``torch``.
        effort: how long to measure.

    Returns:
        The number of rounds, quartiles of the floor's seconds, and for each contender what ``summary`` says,
        with the relative error of the norm that it returned; or the message of its error.
    """
    numbers = second_arguments(operation, gradients.norm)
    timers = {"floor": Timer(floors(gradients), operation, numbers, gradients.device)}
    entries: dict[str, dict[str, Any]] = {}
    for name, contender in contenders.items():
        if operation not in contender.calls:
            continue
        timer = Timer(contender, operation, numbers, gradients.device)
        try:
            norm = timer.first_call()
        except Exception as error:  # a failure of another library is a result
            if name not in RIVALS:
                raise
            entries[name] = {"failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
        else:
            timers[name] = timer
            entries[name] = {"norm_error": None if norm is None else abs(norm / gradients.norm - 1)}
    for timer in timers.values():
        timer.fill(effort.sample_seconds)
    samples = {name: timer.sample for name, timer in timers.items()}
    times = take_turns(samples, *effort.rounds, effort.row_seconds)
    for name in timers.keys() & entries.keys():
        entries[name] |= summary(times[name], times["torch"], times["floor"])
    floor = quartiles(times["floor"])
    return {"rounds": len(times["floor"]), "floor_seconds": floor, "contenders": entries}


def second_arguments(operation: str, norm: float) -> list[float]:
    """The second argument of each call: the norm's order, or a threshold."""
    if operation == "norm":
        return [2.0] * 2 * MOST_CALLS
    if operation == "no clipping":
        return [10 * norm] * 2 * MOST_CALLS
    first = norm / 2 if operation == "clipping" else 1.0
    return [first * SHRINK**i for i in range(2 * MOST_CALLS)]


class Timer:
    """Times a contender's calls of one operation.

    Args:
        contender: the contender.
        operation: a key of ``OPERATIONS``.
        numbers: the second argument of each call.
        device: of the gradients; a timing ends when the device has finished.
    """

    def __init__(
        self, contender: Contender, operation: str, numbers: Sequence[float], device: torch.device = CPU
    ) -> None:
        self.function, self.gradients = contender.calls[operation]
        self.contender = contender
        self.device = device
        self.numbers = [numbers[0]] * len(numbers) if contender.one_number else numbers
        self.calls = 1

    def first_call(self) -> float | None:
        """Compile, and return the norm of the original gradients, if the function returns one."""
        with self.contender.context():
            self.contender.restore()
            norm = self.function(self.gradients, self.numbers[0])
            self._call(self.numbers[1:4])
        return None if norm is None else float(norm)

    def fill(self, seconds: float) -> None:
        """Set the number of calls in a sample, from the time of one call."""
        self.calls = min(max(int(seconds / min(self.sample() for _ in range(3))), 1), MOST_CALLS)

    def sample(self) -> float:
        """Seconds per call, right after as many calls that are not timed.

        These fill the caches, and give the threads of other contenders time to go to sleep.
        """
        before, timed = self.numbers[: self.calls], self.numbers[self.calls : 2 * self.calls]
        with self.contender.context():
            self.contender.restore()
            self._call(before)
            self._finish()
            start = perf_counter()
            self._call(timed)
            self._finish()
            return (perf_counter() - start) / self.calls

    def _finish(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _call(self, numbers: Sequence[float]) -> None:
        function, gradients = self.function, self.gradients
        for number in numbers:
            function(gradients, number)


def summary(times: Sequence[float], torch: Sequence[float], floor: Sequence[float]) -> dict[str, list[float]]:
    """Quartiles over the rounds, each as ``[first, median, third]``.

    Args:
        times: seconds per call, in each round.
        torch: the same for torch.
        floor: the same for the memory traffic alone.

    Returns:
        ``seconds``; ``speedup``, torch's time divided by that of the same round; ``floor_share``, the floor's
        time divided by it.
    """
    return {
        "seconds": quartiles(times),
        "speedup": quartiles([other / own for own, other in zip(times, torch, strict=True)]),
        "floor_share": quartiles([other / own for own, other in zip(times, floor, strict=True)]),
    }
