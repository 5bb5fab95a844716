"""One optimizer of a program, and what its steps were like."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from weakref import ref

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torchclip._core import native
from torchclip.cli.run.names import parameter_names, variable_names
from torchclip.clipper.step import State, Step
from torchclip.history.history import History
from torchclip.history.layers import Layers

__all__ = ["MOST_TIMES", "Watched"]

MOST_TIMES = 10_000
"""How many measurements of time are kept."""


class Watched:
    """One optimizer, and what its steps were like.

    Attributes:
        kind: its class.
        candidates: what the program may call it.
        names: its parameters' names, by their ``id``.
        history: its steps; those of its Clipper, if it has one.
        layers: the norms of its parameters in some of the steps.
        clipped_by: how many steps were clipped in which way.
        nonfinite: the names of the parameters with a gradient that is not finite, by step.
        seconds: how long a Clipper took before a step, in some of them.
        problem: why its norms are not known, or why it is not clipped as the options ask.
    """

    def __init__(self, optimizer: Optimizer, on_gone: Callable[[ref[Optimizer]], object]) -> None:
        self.optimizer = ref(optimizer, on_gone)
        self.kind = type(optimizer).__name__
        self.candidates = variable_names(optimizer)
        self.history = History()
        self.layers = Layers()
        self.look_at(optimizer)
        self.clipped_by: Counter[str] = Counter()
        self.nonfinite: dict[int, list[str]] = {}
        self.seconds: deque[float] = deque(maxlen=MOST_TIMES)
        self.problem: str | None = None
        self.marked = 0.0
        self.marker: RemovableHandle | None = None
        with_kernel = native.step_state(self, math.inf, self.history)
        self.state: State = with_kernel or State(self.history)
        self.history.follow(self.state.flush)
        self.step = Step(optimizer, self.state)
        self.norm: float | None = None  # of the step that is being taken, if it is all there is to record

    def look_at(self, optimizer: Optimizer) -> None:
        """Take in the parameters, of one more group perhaps than before."""
        groups = optimizer.param_groups
        self.groups = len(groups)
        self.names = parameter_names(optimizer)
        self.on_host = _on_host(optimizer)

    @property
    def steps(self) -> int:
        """How many there were."""
        return self.state.number

    def label(self, name: str) -> str:
        """What to call it in a report."""
        return name if name.startswith(self.kind) else f"{name} ({self.kind})"


def _on_host(optimizer: Optimizer) -> bool:
    """Whether the parameters are in host memory, where to look at a value is not to wait."""
    return all(p.is_cpu for group in optimizer.param_groups for p in group["params"][:1])
