"""One optimizer of a program, and a record of its steps."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from weakref import ref

from torch.optim import Optimizer

from torchclip.cli.run.calls import Call
from torchclip.cli.run.losses import Loss
from torchclip.cli.run.names import parameter_names, variable_names
from torchclip.clipper.clipper import Clipper
from torchclip.clipper.step import Member, Step
from torchclip.history.history import History
from torchclip.history.layers import Layers

_MOST_ROUNDS = 10_000  # as many as a history keeps


class OptimizerRecord:
    """One optimizer, and a record of its steps.

    Attributes:
        optimizer: a weak reference to it.
        kind: its class.
        candidates: the program's possible names for it.
        names: its parameters' names, by their ``id``.
        steps: the number of its steps.
        history: its steps; those of its Clipper, if it has one.
        layers: the norms of its parameters in some of the steps.
        groups: the number of its parameter groups.
        on_host: whether the parameters are in host memory, so that reading a value does not wait.
        rounds: the latest steps, each with the number of backward passes before it.
        clipped_by: the number of steps by the way in which they were clipped.
        nonfinite: the names of the parameters with a gradient that is not finite, by step.
        problem: why its norms are not known, or why it is not clipped as the options say.
        step: the running step.
        loss: the loss of this step, if it is known.
        call: what torch's functions did to the gradients of this step, if a Clipper of this run measures them
            afterwards.
        clipper: its Clipper in this step, if it has one.
        is_measured: whether this step is recorded.
    """

    def __init__(self, optimizer: Optimizer, on_gone: Callable[[ref[Optimizer]], object]) -> None:
        self.optimizer = ref(optimizer, on_gone)
        self.kind = type(optimizer).__name__
        self.candidates = variable_names(optimizer)
        self.steps = 0
        self.history = History()
        self.layers = Layers()
        self.rounds: deque[tuple[int, int]] = deque(maxlen=_MOST_ROUNDS)
        self.clipped_by: Counter[str] = Counter()
        self.nonfinite: dict[int, list[str]] = {}
        self.problem: str | None = None
        self.step = Step(self.optimizer, Member(self.optimizer))
        self.loss: Loss | None = None
        self.call: Call | None = None
        self.clipper: Clipper | None = None
        self.is_measured = False
        self.read_parameters(optimizer)

    def read_parameters(self, optimizer: Optimizer) -> None:
        """Look up the names of the parameters, perhaps with a new group."""
        self.groups = len(optimizer.param_groups)
        self.names = parameter_names(optimizer)
        self.on_host = all(p.is_cpu for group in optimizer.param_groups for p in group["params"][:1])
