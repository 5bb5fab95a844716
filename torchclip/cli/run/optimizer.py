"""One optimizer of a program, and what its steps were like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from weakref import ref

from torch.optim import Optimizer

from torchclip.cli.run.calls import Call
from torchclip.cli.run.losses import Loss
from torchclip.cli.run.names import parameter_names, variable_names
from torchclip.clipper.step import Member, Step
from torchclip.history.history import History
from torchclip.history.layers import Layers

__all__ = ["OptimizerRecord"]

MOST_ROUNDS = 10_000  # as many as a history keeps steps


class OptimizerRecord:
    """One optimizer, and what its steps were like.

    Attributes:
        optimizer: a weak reference to it.
        kind: its class.
        candidates: what the program may call it.
        names: its parameters' names, by their ``id``.
        steps: how many steps it has taken.
        history: its steps; those of its Clipper, if it has one.
        layers: the norms of its parameters in some of the steps.
        rounds: after how many backward passes each of the latest steps was taken.
        clipped_by: how many steps were clipped in which way.
        nonfinite: the names of the parameters with a gradient that is not finite, by step.
        problem: why its norms are not known, or why it is not clipped as the options ask.
        step: the step that it is taking.
        loss: the loss of this step, if it is known.
        call: what torch's functions have done to the gradients of this step, where a Clipper of this run
            looks at them afterwards.
        is_measured: whether this step is recorded.
    """

    def __init__(self, optimizer: Optimizer, on_gone: Callable[[ref[Optimizer]], object]) -> None:
        self.optimizer = ref(optimizer, on_gone)
        self.kind = type(optimizer).__name__
        self.candidates = variable_names(optimizer)
        self.steps = 0
        self.history = History()
        self.layers = Layers()
        self.rounds: dict[int, int] = {}
        self.clipped_by: Counter[str] = Counter()
        self.nonfinite: dict[int, list[str]] = {}
        self.problem: str | None = None
        self.step = Step(self.optimizer, Member(self.optimizer))
        self.loss: Loss | None = None
        self.call: Call | None = None
        self.is_measured = False
        self.read_parameters(optimizer)

    def read_parameters(self, optimizer: Optimizer) -> None:
        """Learn the names of the parameters, of one more group perhaps than before."""
        self.groups = len(optimizer.param_groups)
        self.names = parameter_names(optimizer)
        self.on_host = _on_host(optimizer)

    def note_round(self, backwards: int) -> None:
        """Note after how many backward passes this step is taken."""
        if backwards:
            self.rounds[self.steps] = backwards
            if len(self.rounds) > MOST_ROUNDS:
                del self.rounds[next(iter(self.rounds))]

    def label(self, name: str) -> str:
        """What to call it in a report."""
        return name if name.startswith(self.kind) else f"{name} ({self.kind})"


def _on_host(optimizer: Optimizer) -> bool:
    """Whether the parameters are in host memory, where reading a value does not wait."""
    return all(p.is_cpu for group in optimizer.param_groups for p in group["params"][:1])
