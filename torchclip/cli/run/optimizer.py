"""One optimizer of a program, and a record of its steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from weakref import ref

from torch.optim import Optimizer

from torchclip.cli.run.names import Modules, variable_of
from torchclip.history.history import History
from torchclip.history.layers import Layers


class OptimizerRecord:
    """One optimizer, and a record of its steps.

    Attributes:
        optimizer: a weak reference to it.
        kind: its class.
        variable: the script's variable for it, if there is one.
        names: its parameters' names, by their ``id``.
        steps: the number of its steps.
        history: its steps; those of its Clipper, if it has one.
        layers: the norms of its parameters in some of the steps.
        groups: the number of its parameter groups.
        on_host: whether the parameters are in host memory, so that reading a value does not wait.
        clipped_by: the number of steps by the way in which they were clipped.
        rounds: the number of backward passes before each of its steps, if these are within backward passes.
        nonfinite: the names of the parameters with a gradient that is not finite, by step.
        problem: why its norms are not known, or why it is not clipped as the options say.
        seen: the number of calls of clipping functions, and of backward passes, before its last step.
        gradients: the ``id`` of each gradient of its last step.
        is_measured: whether the running step is recorded.
        is_tried: whether a trial clips in the running step, as the program does not.
        wrapped: a weak reference to the optimizer with a Clipper that it wraps; None if there is none.
    """

    def __init__(
        self, optimizer: Optimizer, modules: Modules, on_gone: Callable[[ref[Optimizer]], object]
    ) -> None:
        self.optimizer = ref(optimizer, on_gone)
        self.kind = type(optimizer).__name__
        self.variable = variable_of(optimizer)
        self.steps = 0
        self.history = History()
        self.layers = Layers()
        self.clipped_by: Counter[str] = Counter()
        self.rounds: list[int] = []
        self.nonfinite: dict[int, list[str]] = {}
        self.problem: str | None = None
        self.seen = 0, 0
        self.gradients = frozenset[int]()
        self.is_measured = self.is_tried = False
        self.wrapped: ref[Optimizer] | None = None
        self.read_parameters(optimizer, modules)

    def with_clipper(self, optimizer: Optimizer) -> Optimizer:
        """The one whose Clipper clips, if there is one: an optimizer that this one wraps, or this one."""
        wrapped = None if self.wrapped is None else self.wrapped()
        return optimizer if wrapped is None else wrapped

    def read_parameters(self, optimizer: Optimizer, modules: Modules) -> None:
        """Look up the names of the parameters, perhaps with a new group."""
        self.groups = len(optimizer.param_groups)
        self.names = modules.name(optimizer)
        self.on_host = all(p.is_cpu for group in optimizer.param_groups for p in group["params"][:1])
