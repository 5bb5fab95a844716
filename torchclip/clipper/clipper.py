"""Clipping that belongs to the optimizer: set up once, done before every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import RLock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from weakref import ref

from torch import Tensor, nn
from torch.optim import Optimizer

from torchclip.clipper import registry, saved
from torchclip.clipper.optimizers import optimizers_of, parameters_of
from torchclip.clipper.rounds import Rounds
from torchclip.clipper.sets import set_names
from torchclip.clipper.settings import Nonfinite, Scope, Settings, check_history
from torchclip.clipper.step import Step
from torchclip.history.history import History
from torchclip.history.records import Record
from torchclip.thresholds.base import MaxNorm, Rule, Threshold

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Clipper", "Nonfinite", "Scope"]


class Clipper:
    r"""Clips the gradients of an optimizer, or of several that step together, before every step.

    Create it once, then only call ``optimizer.step()``:

        optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
        clipper = torchclip.Clipper(optimizer, max_norm=1.0)

    This works with gradient accumulation, learning rate schedulers, ``torch.amp.GradScaler`` and closures.
    With a GradScaler, norms and thresholds are those of the unscaled gradients.  With a closure, it clips
    after each backward pass of the closure; a step of LBFGS has a record for each.  A fused optimizer gets
    the coefficient as its ``grad_scale`` and scales the gradients during its step, which saves a pass over
    them.  Afterwards ``p.grad`` is the clipped gradient as usual, up to the rounding of that float32 number.

    Optimizers that step together on the gradients of one backward pass, such as Muon and AdamW, are passed as
    a list: ``Clipper([muon, adamw], max_norm=1.0)``.  The first of them to step clips the gradients of all.
    There is one record for each such round.  It ends when every optimizer has stepped, when one steps again,
    or when one that has stepped has a new gradient.  Optimizers that step during a backward pass need a
    Clipper each.

    A parameter group may have its own ``max_norm``, which may change during training like a learning rate:

        head = {"params": model.head.parameters(), "max_norm": 0.1}
        optimizer = torch.optim.SGD([{"params": model.body.parameters()}, head], lr=0.1)

    The group is then clipped by itself.  ``None`` exempts it: it is not clipped, and counts neither in the
    recorded norm nor for ``skip_above``, unless all groups are exempt.  A gradient that parameters of several
    groups share is clipped once, to the lowest of their thresholds.

    A step that ends in an exception is not recorded, and the next one gets its number.  If a GradScaler skips
    a step, there is a record of it only if the optimizer is fused.  A Clipper can be neither copied nor
    pickled, and copies of its optimizer do not clip: attach a new one to them, and load the old one's
    ``state_dict``.  It does not keep its optimizers alive.

    Args:
        optimizer: any ``torch.optim.Optimizer``, or a list of optimizers that step together.
        max_norm: the threshold: a number (``float("inf")`` only measures), a callable that takes the number
            of the step, from 0, or a threshold object such as ``Percentile``.  The object does not change;
            the copies that learn are in ``thresholds``.  They learn nothing from a step without finite
            gradients, or of which ``nonfinite="zero"`` has left only zeros.  They leave a norm up to the
            threshold as it is; at a number, the 1e-6 of ``clip_grad_norm_`` applies.  Or another rule:
            ``Value``, ``Adaptive``, ``BlockRMS``; the ``clip_coef`` of a record is then the norm after
            clipping divided by the norm before.
        norm_type: the order of the norm, any number or ``"inf"``.
        scope: which gradients are clipped together: ``"global"``, all; ``"group"``, those of each parameter
            group; ``"parameter"``, each by itself.  Each of these sets gets its own copy of a threshold
            object.  ``AdaGC`` always works on single parameters.
        nonfinite: what to do if the norm is ``inf`` or ``nan``.  ``"propagate"``: nothing, as in torch.
            ``"error"``: raise an error that names the parameters, before anything changes (except what LBFGS
            did earlier in the same step).  ``"skip"``: the step changes neither parameters nor optimizer
            state; the gradients are hidden from it, and restored afterwards.  On an accelerator this waits
            for the norm, except with a fused optimizer, which uses its ``found_inf``.  ``"zero"``: set the
            non-finite elements to 0, and then clip as usual.  They stay 0 if the step is then skipped, or if
            a threshold of your own raises an error.
        group: a process group, or several, whose other ranks have further gradients, as for
            ``clip_grad_norm_``.  All ranks must have the same number of parameter groups.  DTensors need
            none.
        on_clip: called with the ``Record`` of every step, after the gradients were clipped and before the
            optimizer steps.  If it raises an exception, the step does not happen and is not recorded; the
            gradients stay clipped, and a threshold object keeps what it has learned.  What it does to
            gradients is not measured.  On an accelerator this waits for the norm.
        model: the module whose parameters the optimizer has, or a list of several.  Errors, ``norms`` and
            ``history.layers`` then use the names in it, without the prefixes of ``torch.compile`` and data
            parallelism.  Without it they use the names of ``model.named_parameters()`` if the optimizer was
            made from these, and otherwise a parameter's position in the optimizer.
        skip_above: skip steps whose norm is above this threshold: anything that ``max_norm`` may be, such as
            a number or ``RollingSigma()``.  They change neither parameters nor optimizer state, as with
            ``nonfinite="skip"``.  None for no limit.
        skip_loss_above: skip steps whose loss is above this threshold, which may be anything that
            ``skip_above`` may be.  Assign ``clipper.loss = loss`` before each step.  On several ranks the
            mean of their losses decides; one all-reduce of a few kilobytes in each step finds it.  The ranks
            are those of ``group``, of the mesh of DTensor parameters, or of a DistributedDataParallel in
            ``model``.  A loss below 0 skips nothing, and teaches the threshold nothing.  On an accelerator
            this waits for the loss, except with a fused optimizer.
        max_skips: how many steps in a row may be skipped for one reason; None for any number.  After as many
            that ``skip_above`` has skipped, the next one is taken, clipped to that limit, with one warning,
            so that a run whose norms stay high continues.  For ``skip_loss_above`` it is taken, too.  For
            ``nonfinite="skip"`` an error names the parameters; on an accelerator it may come some steps
            later, as nothing waits for it.  Steps that a GradScaler skips do not count.
        layers_every: how often, in steps, to record the norm of each single parameter in ``history.layers``;
            0 for never.  With sharded gradients it must be the same on all ranks.
        updates: in these steps, also record in ``history.layers.updates`` how far the step moves each
            parameter, compared with its norm.  Such a step keeps a copy of the parameters, and takes
            longer by about three passes over them.

    Attributes:
        history (History): what clipping did, step by step.  Reading it waits for an accelerator.  With
            several thresholds, a ``Record`` has the lowest threshold and the lowest coefficient.  To keep
            another number of records, assign ``torchclip.history.History(maxlen=...)`` before the first step.

    Raises:
        TypeError: if ``optimizer`` is not an optimizer, or ``max_norm`` is none of the above.
        ValueError: if an argument has no meaning by itself or beside another one, such as ``max_skips``
            without anything that skips; if the optimizer already has a Clipper, or is passed twice; if
            ``model`` has none of its parameters; if LBFGS is one of several optimizers, or is to skip steps;
            if nothing shows which ranks train together, and ``skip_loss_above`` is passed.

    Examples:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> clipper = Clipper(optimizer, max_norm=1.0)
        >>> (weight * torch.tensor([3.0, 4.0])).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([-0.6000, -0.8000])
        >>> clipper.last.total_norm, clipper.last.clipped
        (5.0, True)
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        max_norm: MaxNorm | Rule,
        *,
        norm_type: float | str = 2.0,
        scope: Scope = "global",
        nonfinite: Nonfinite = "propagate",
        group: ProcessGroup | Sequence[ProcessGroup] | None = None,
        on_clip: Callable[[Record], object] | None = None,
        model: nn.Module | Sequence[nn.Module] | None = None,
        skip_above: MaxNorm | None = None,
        skip_loss_above: MaxNorm | None = None,
        max_skips: int | None = None,
        layers_every: int = 0,
        updates: bool = False,
    ) -> None:
        max_norm = registry.adjusted(optimizer, max_norm)
        optimizers = optimizers_of(optimizer, registry.clippers)
        settings = Settings(
            optimizers,
            max_norm,
            norm_type=norm_type,
            scope=scope,
            nonfinite=nonfinite,
            group=group,
            on_clip=on_clip,
            model=model,
            skip_above=skip_above,
            skip_loss_above=skip_loss_above,
            max_skips=max_skips,
            layers_every=layers_every,
            updates=updates,
        )
        # Held while a round is opened, recorded or saved.  A signal handler may save in the middle of these.
        self._lock = RLock()
        self._steps = [Step(i, each, self._lock) for i, each in enumerate(optimizers)]
        self._rounds = Rounds(self._steps, settings, self._lock)
        self._rounds.history._is_followed = True
        self._know_sets()
        for step, each in zip(self._steps, optimizers, strict=True):
            before, after = partial(self._rounds.before_step, step), partial(self._rounds.after_step, step)
            vars(after)["clipper"] = self  # through which an optimizer keeps the Clipper alive
            step.hooks += [each.register_step_pre_hook(before), each.register_step_post_hook(after)]
            registry.clippers[each] = ref(self)

    @property
    def optimizer(self) -> Optimizer:
        """The first of the optimizers, which the Clipper does not keep alive."""
        return self.optimizers[0]

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """All of them, in the order in which they were passed."""
        return tuple(step.optimizer for step in self._steps)

    @property
    def max_norm(self) -> MaxNorm | Rule:
        """The threshold or rule, to read and to set: anything that the argument may be.

        A new one applies from the next step on, and is checked as in the constructor.  A threshold object
        starts to learn then.
        """
        return self._rounds.settings.max_norm

    @max_norm.setter
    def max_norm(self, max_norm: MaxNorm | Rule) -> None:
        self._rounds.settings = self._rounds.settings.with_max_norm(max_norm)
        self._know_sets()

    @property
    def history(self) -> History:
        """What clipping did, step by step."""
        return self._rounds.history

    @history.setter
    def history(self, history: History) -> None:
        before = self._rounds.history
        if history is before:
            return
        check_history(history)
        self._rounds.history = history
        before._is_followed, history._is_followed = False, before._is_followed

    @property
    def loss(self) -> float | Tensor | None:
        """The loss for the next step's record; None if none was assigned.

        Assign a number, or a tensor with one element, which is read only when the history is:
        ``clipper.loss = loss``, after ``zero_grad()``; once or, where gradients are accumulated, at each
        backward pass of a step: the losses are added up.  The loss of a step that a GradScaler skips is
        dropped if the gradients are then set to None, as ``zero_grad()`` does.
        """
        return self._rounds.loss.value

    @loss.setter
    def loss(self, loss: float | Tensor | None) -> None:
        self._rounds.loss.assign(loss, parameters_of(*self.optimizers))

    @property
    def last(self) -> Record | None:
        """The record of the latest step, or None before the first."""
        return self.history[-1] if len(self.history) else None

    @property
    def thresholds(self) -> Mapping[str, Threshold]:
        """The threshold objects with what they have learned, by the name of the set that each is for.

        ``"all"``, ``"group 0"`` or ``"group 0, parameter 0"`` and so on, according to ``scope``; with several
        optimizers ``"optimizer 1, group 0"``, and the names of single parameters if there is a ``model``.
        None if ``max_norm`` is a number or a callable.  Read-only.
        """
        self._know_sets()
        learned = self._rounds.settings.bank.thresholds
        asked = [name for name, is_asked in self._sets.items() if is_asked]
        return MappingProxyType({name: learned[name] for name in asked if name in learned})

    def norms(self) -> dict[str, float]:
        """The norm of each gradient as it is now, by the name of its parameter, largest first.

        Call it between ``backward()`` and ``step()``, or from ``on_clip``, to see which layer explodes; after
        the step the gradients are the clipped ones.  With a GradScaler call its ``unscale_()`` first.  Waits
        for an accelerator.  With a sharded model all ranks must call it, as they exchange the norms of their
        sets.
        """
        self._rounds.is_running()  # undoes what a failed step has left
        settings = self._rounds.settings
        return settings.names.largest_norms(self.optimizers, settings.norm_type)

    def detach(self) -> None:
        """Remove the clipper from its optimizers, which no longer clip.  Its history can still be read.

        Raises:
            RuntimeError: if called during a step, from ``on_clip`` or a closure.
        """
        if self._rounds.is_running():
            raise RuntimeError("detach() was called during a step; call it after optimizer.step()")
        with self._lock:
            self._rounds.close()
        self.history._is_followed = False
        for step in self._steps:
            optimizer = step.reference()
            if optimizer is not None and step.hooks:  # without them it may have another Clipper
                registry.clippers.pop(optimizer, None)
            for hook in step.hooks:
                hook.remove()
            step.hooks = []

    def __enter__(self) -> Clipper:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to continue exactly like an uninterrupted one, as plain data.

        It includes the history with all records.  During a step, also from another thread, or in a round in
        which optimizers have yet to step, it is the state of before.
        """
        with self._lock:
            self._know_sets()
            return saved.state_of(self._rounds.settings, self._rounds, self._owner)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict``; this clipper keeps its own arguments.

        Warns if the saved clipper had another kind of ``max_norm``, another ``scope`` or ``norm_type``, and
        nothing that was learned is lost.

        Raises:
            TypeError: if ``state`` or a part of it is of a wrong type.
            ValueError: if ``state`` is not a clipper's, or is for another number of optimizers, or its
                thresholds are of another kind, for other parameters, or have learned from norms of another
                ``scope`` or ``norm_type``.  Then nothing has changed.
            RuntimeError: if called during a step, from ``on_clip`` or a closure.
        """
        if self._rounds.is_running():  # which undoes what a failed step has left
            raise RuntimeError("load_state_dict() was called during a step; call it after optimizer.step()")
        with self._lock:
            self._know_sets()
            saved.load(state, self._rounds.settings, self._rounds, self._owner, [*self._sets])
            self._know_sets()

    def _know_sets(self) -> None:
        """Find all sets, as parameter groups may have been added; a state includes all of them."""
        settings = self._rounds.settings
        optimizers = [optimizer for step in self._steps if (optimizer := step.reference()) is not None]
        if len(optimizers) == len(self._steps):  # else they have no more sets than before
            self._sets = set_names(optimizers, settings)
            settings.bank.add(self._sets)  # also of groups with their own threshold, which may be removed
            self._owner = saved.owner(optimizers, settings.names)
        for limit in settings.limits:
            limit.bank.add(["all"])

    def __getstate__(self) -> None:
        raise TypeError(
            "a Clipper can be neither copied nor pickled, as its optimizer's hooks cannot; attach a new one "
            "to the copied optimizer and load this one's state_dict()"
        )

    def __repr__(self) -> str:
        kinds, settings = ", ".join(step.kind for step in self._steps), self._rounds.settings
        return (
            f"Clipper({kinds if len(self._steps) == 1 else f'[{kinds}]'}, "
            f"max_norm={self.max_norm!r}, norm_type={settings.norm_type}, "
            f"scope={settings.scope!r}, nonfinite={settings.nonfinite!r})"
        )
