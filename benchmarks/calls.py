"""How long single calls take: torch, torch.compile, optax, and torchclip with and without its kernel.

    pip install '.[bench]'
    python benchmarks/calls.py [--only WORKLOAD] [--json FILE]
    python benchmarks/calls.py --scaling [--json FILE]

Calls are warm, and ratios are taken within a round.  ``--scaling`` measures 10 to 100,000 gradients and 1 KiB
to 2 GiB; it needs 8 GiB.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from contenders import NAMES, OPERATIONS, RIVALS, Contender, Gradients, contenders, floors
from turns import options_of, print_machine, quartiles, take_turns, write_results
from workloads import SCALING, WORKLOADS

from torchclip.cli import info

SAMPLE_SECONDS = 2e-3  # for which each timing repeats the call
ROUNDS, ROW_SECONDS = (15, 101), 3.0  # the least and the most; between these, rounds begin for this time
SHRINK = 0.98  # the threshold shrinks from call to call, so that every call clips, even in bfloat16
MOST_CALLS = 200  # in a sample; twice as many shrink gradients to 0.03 %, which loses no digits

Row = dict[str, Any]


def measure(workload: str, rivals: Sequence[str]) -> Iterator[Row]:
    """A row for each operation on a workload.

    Args:
        workload: its name.
        rivals: which of ``torch.compile`` and ``optax`` take part; optax only if it is installed.
    """
    found = (SCALING | WORKLOADS)[workload]
    gradients = Gradients(found)
    others = contenders(gradients, rivals)
    size = {"tensors": len(found.shapes), "elements": found.elements, "bytes": found.bytes}
    for operation in OPERATIONS:
        row = {"workload": workload, "title": found.title, "operation": operation, **size}
        yield row | compare(gradients, operation, others)


def compare(gradients: Gradients, operation: str, contenders: Mapping[str, Contender]) -> dict[str, Any]:
    """Time one operation in all contenders, round by round, and the memory traffic alone.

    Args:
        gradients: the gradients to clip.
        operation: a key of ``OPERATIONS``.
        contenders: by name, including ``torch``.

    Returns:
        The number of rounds, quartiles of the floor's seconds, and for each contender what ``summary`` says,
        with the relative error of the norm that it returned; or the message of its error.
    """
    numbers = second_arguments(operation, gradients.norm)
    timers = {"floor": Timer(floors(gradients), operation, numbers)}
    entries: dict[str, dict[str, Any]] = {}
    for name, contender in contenders.items():
        if operation not in contender.calls:
            continue
        timer = Timer(contender, operation, numbers)
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
        timer.fill(SAMPLE_SECONDS)
    samples = {name: timer.sample for name, timer in timers.items()}
    times = take_turns(samples, *ROUNDS, ROW_SECONDS)
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
    """

    def __init__(self, contender: Contender, operation: str, numbers: Sequence[float]) -> None:
        self.function, self.gradients = contender.calls[operation]
        self.contender = contender
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
            start = perf_counter()
            self._call(timed)
            return (perf_counter() - start) / self.calls

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


def main() -> None:
    """Measure and print."""
    parser = options_of(__doc__)
    parser.add_argument("--only", action="append", choices=WORKLOADS, help="a workload; may be repeated")
    parser.add_argument("--scaling", action="store_true", help="many gradients, and large ones, instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    arguments = parser.parse_args()
    print_machine()
    # For --scaling, torch.compile would take hours, and optax would need memory for two more copies.
    rivals = [] if arguments.scaling else RIVALS
    rows = []
    for workload in SCALING if arguments.scaling else (arguments.only or WORKLOADS):
        print(f"\n{(SCALING | WORKLOADS)[workload].title}")
        for row in measure(workload, rivals):
            rows.append(row)
            print(f"  {OPERATIONS[row['operation']]}")
            for name in NAMES:
                if name in row["contenders"]:
                    print(f"    {name:<14}{_shown(row['contenders'][name])}", flush=True)
    if arguments.json:
        versions = {name: info.installed_version(name) for name in ("jax", "optax")}
        write_results(arguments.json, rows, versions)


def _shown(result: dict[str, Any]) -> str:
    if "failed" in result:
        return f"failed: {result['failed']}"
    return f"{1e6 * result['seconds'][1]:>14,.2f} µs, {result['speedup'][1]:.2f} times torch's speed"


if __name__ == "__main__":
    main()
