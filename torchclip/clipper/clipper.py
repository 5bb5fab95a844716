"""Clipping that belongs to the optimizer: said once, done before every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast, get_args
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torchclip._core import arguments, mesh, native
from torchclip._core.batch import Norms
from torchclip.clipper.clipping import Clipping, Row
from torchclip.clipper.names import Names
from torchclip.clipper.nonfinite import Nonfinite
from torchclip.clipper.rules import Rule
from torchclip.clipper.scope import Scope, Scoping
from torchclip.clipper.spikes import Spikes
from torchclip.clipper.step import State, Step, creates_state, with_closure
from torchclip.history.history import History
from torchclip.history.records import Record
from torchclip.thresholds.bank import ThresholdBank
from torchclip.thresholds.base import MaxNorm, Threshold

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Clipper", "Nonfinite", "Scope"]

_clipped_optimizers: WeakSet[Optimizer] = WeakSet()


class Clipper:
    r"""Clips the gradients of an optimizer before every step it takes.

    Say once how to clip, then only call ``optimizer.step()``:

        optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
        clipper = torchclip.Clipper(optimizer, max_norm=1.0)

    This works with closures (clipping follows the closure's backward pass, each time, and a step of LBFGS has
    a record for each), gradient accumulation, learning rate schedulers, and ``torch.amp.GradScaler``: norms
    and thresholds are those of the unscaled gradients.  Fused optimizers get the coefficient as their
    ``grad_scale`` and multiply it in while they step, so that no pass over the gradients is spent on it;
    afterwards ``p.grad`` is the clipped gradient as usual, to the rounding of that float32 number.

    A parameter group may carry its own ``max_norm``: it is then clipped on its own, with it, and ``None``
    leaves it unclipped (its norm is measured all the same).  Like a learning rate it may change during
    training:

        head = {"params": model.head.parameters(), "max_norm": 0.1}
        optimizer = torch.optim.SGD([{"params": model.body.parameters()}, head], lr=0.1)

    Copies and pickles of the optimizer do not clip, as they have no hooks; attach a new clipper to them and
    load the old one's ``state_dict``.  The clipper itself can be neither copied nor pickled.

    A step that a GradScaler leaves out never comes to an unfused optimizer, nor to its clipper; with a fused
    one it is recorded, as skipped.  A step that ends in an exception is not recorded; the next one gets its
    number.

    A gradient that parameters of several groups share is clipped once, to the tightest of their thresholds.
    Without any gradient, or with nothing finite left of it, there is nothing to learn for a threshold object.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        max_norm: the threshold: a number (``float("inf")`` only measures), a threshold object such as
            ``Percentile``, or a callable that is given the number of the step, from 0.  The object stays as
            it is; the copies that learn are in ``thresholds``. A norm up to such an object's threshold is
            left alone exactly; at a number the 1e-6 of ``clip_grad_norm_`` counts.  Or another way to clip:
            ``Value``, ``Adaptive``, ``BlockRMS``.  Then a record's ``clip_coef`` is the norm after clipping
            in terms of the norm before, and its ``max_norm`` that of the groups that have their own.
        norm_type: the order of the norm, any number or ``"inf"``.
        scope: what is clipped together: ``"global"``, all parameters; ``"group"``, each parameter group;
            ``"parameter"``, each parameter. Each of them gets its own copy of a threshold object; ``AdaGC``
            is for single parameters, whatever is passed here.
        nonfinite: what to do about a norm that is ``inf`` or ``nan``. ``"propagate"``: nothing, as torch.
            ``"error"``: raise, naming the parameters, before anything changes (but for what LBFGS did in
            the same step before). ``"skip"``: this step changes neither parameters nor optimizer state; it
            does not see the gradients, which are there again after it. On an accelerator this waits for the
            norm, but not with a fused optimizer, which is told by its ``found_inf``. ``"zero"``: non-finite
            elements become 0, and the rest is clipped.
        group: a process group, or several, whose other ranks hold further gradients, as for
            ``clip_grad_norm_``; all ranks must have the same number of parameter groups.  DTensors need
            none.
        on_clip: called with the ``Record`` of every step, just before anything is changed and before it is
            in the history; an exception from it calls the step off, and only what a threshold object has
            learned stays.  If it changes gradients, these are measured again and clipped to the same
            threshold, and the history says what was done; sharded gradients it must leave alone, as other
            ranks know their norm already.  On an accelerator this waits for the norm.
        model: the module whose parameters the optimizer holds, or a list of several. Errors, ``norms`` and
            ``history.layers`` then call parameters by their names in it, without what ``torch.compile`` and
            data parallelism put before them.  Without it they do so if the optimizer was made from
            ``model.named_parameters()``, and else give a parameter's place in the optimizer.
        skip_above: leave out steps whose norm is above this: they change neither parameters nor optimizer
            state, as with ``nonfinite="skip"``. Whatever ``max_norm`` may be, such as a number or
            ``RollingSigma()``, by the norm of all gradients. None for no limit.
        max_skips: after so many steps in a row that ``skip_above`` has left out, the next one is taken,
            clipped to that limit, with a warning once, so that a run whose norms have risen for good does not
            stand still; None for any number. A step that is not finite is left out all the same.
        layers_every: keep the norm of each single parameter at every so many steps, in ``history.layers``;
            0 for never. With sharded gradients the same on all ranks.

    Attributes:
        history (History): what clipping did, step by step; reading it is what waits for an accelerator.
            With several thresholds a ``Record`` holds the smallest of them and the smallest coefficient.
            To keep another number of records, assign ``torchclip.history.History(maxlen=...)`` before the
            first step.

    Raises:
        TypeError: if ``optimizer`` is no optimizer, or ``max_norm`` is none of the above.
        ValueError: if ``max_norm`` is negative or NaN, ``scope`` or ``nonfinite`` unknown, the optimizer
            already has a clipper, LBFGS, whose steps cannot be skipped half-way, is to skip some,
            ``group`` is combined with ``"parameter"``, or a policy other than ``"propagate"`` with a
            ``norm_type`` of 0 or less, whose norm may be finite though a gradient is not.

    Examples:
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
        optimizer: Optimizer,
        max_norm: MaxNorm | Rule,
        *,
        norm_type: float | str = 2.0,
        scope: Scope = "global",
        nonfinite: Nonfinite = "propagate",
        group: ProcessGroup | Sequence[ProcessGroup] | None = None,
        on_clip: Callable[[Record], object] | None = None,
        model: nn.Module | Sequence[nn.Module] | None = None,
        skip_above: MaxNorm | None = None,
        max_skips: int | None = None,
        layers_every: int = 0,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"`optimizer` must be a torch.optim.Optimizer, got {arguments.shown(optimizer)}")
        if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            raise TypeError(
                f"`optimizer` is a wrapper without hooks ({type(optimizer).__name__}); pass the optimizer "
                "that it wraps"
            )
        if optimizer in _clipped_optimizers:
            raise ValueError("`optimizer` already has a Clipper; call its detach() first")
        arguments.option("scope", scope, get_args(Scope))
        arguments.option("nonfinite", nonfinite, get_args(Nonfinite))
        if isinstance(optimizer, torch.optim.LBFGS) and (nonfinite == "skip" or skip_above is not None):
            argument, remedy = ("nonfinite='skip'", "use 'error' or 'zero'")
            if nonfinite != "skip":
                argument, remedy = ("skip_above", "leave it out")
            raise ValueError(
                f"`{argument}` does not work with LBFGS, which moves the parameters several times in a step; "
                f"{remedy}"
            )
        if max_skips is not None and skip_above is None:
            raise ValueError("`max_skips` says how often `skip_above` may skip; pass that, too")
        if on_clip is not None and not callable(on_clip):
            raise TypeError(f"`on_clip` must be callable, got {arguments.shown(on_clip)}")
        self.optimizer = optimizer
        # A tensor has a method of that name, too.
        is_way = isinstance(max_norm, Rule) and not isinstance(max_norm, (type, Tensor))
        self._way = cast("Rule", max_norm) if is_way else None
        self._rule = ThresholdBank(math.inf if is_way else cast("MaxNorm", max_norm))
        if self._rule.per_parameter:
            scope = "parameter"
        self._order = arguments.norm_order(norm_type)
        if self._order <= 0 and nonfinite != "propagate":
            raise ValueError(
                f"`nonfinite={nonfinite!r}` goes by the norm, which of order {self._order} may be finite "
                "though a gradient is not; pass an order above 0 as `norm_type`, or use 'propagate'"
            )
        spikes = None if skip_above is None else Spikes(skip_above, max_skips, self._order)
        groups = mesh.as_groups(group) or None
        if groups and scope == "parameter":
            what = "AdaGC" if self._rule.per_parameter else "`scope='parameter'`"
            raise ValueError(
                f"`group` has no meaning with {what}, which clips every gradient by its norm: leave it out"
            )
        self._scope: Scope = scope
        self._nonfinite: Nonfinite = nonfinite
        self._names = Names(optimizer, model)
        self._layers_every = arguments.count("layers_every", layers_every, least=0)
        # What goes the short way while the kernel is on, with what is found to be usual in each step.
        usual = scope == "global" and self._order == 2 and not groups
        takes_number = self._way is None and on_clip is None and spikes is None and not self._layers_every
        usual_max_norm = self._rule.number if usual and takes_number else None
        history = History()
        with_kernel = native.step_state(self, usual_max_norm, history)
        self._state: State = with_kernel or State(history)
        history.follow(self._state.flush)
        self._step = Step(optimizer, self._state)
        # What is to be recorded of a step that did not go the short way.
        self._rows: list[Row] = []
        self._layers: tuple[list[str], Norms] | None = None
        self._clipping = Clipping(
            self._step,
            self._rule,
            Scoping(scope, self._order, groups),
            nonfinite,
            spikes,
            self._way,
            on_clip,
            self._names.of_gradients,
        )
        own_hooks = self._before_step, self._after_step
        before_step, after_step = own_hooks if with_kernel is None else with_kernel.hooks()
        self._hooks: tuple[RemovableHandle, ...] = (
            optimizer.register_step_pre_hook(before_step),
            optimizer.register_step_post_hook(after_step),
        )
        self._clipping.hook_id = self._hooks[0].id
        _clipped_optimizers.add(optimizer)

    @property
    def history(self) -> History:
        """What clipping did, step by step."""
        return self._state.history

    @history.setter
    def history(self, history: History) -> None:
        self._state.history.unfollow(self._state.flush)
        self._state.history = history
        history.follow(self._state.flush)

    @property
    def last(self) -> Record | None:
        """The record of the latest step, or None before the first."""
        return self.history[-1] if len(self.history) else None

    @property
    def thresholds(self) -> Mapping[str, Threshold]:
        """The threshold objects with what they have learned, by the name of what each of them is for.

        From the first step on: ``"all"``, ``"group 0"`` or ``"group 0, parameter 0"`` and so on, according to
        ``scope``.  None if ``max_norm`` is a number or a callable.  Read-only.
        """
        return self._rule.thresholds

    def norms(self) -> dict[str, float]:
        """The norm of each gradient as it is now, by the name of its parameter, largest first.

        Call it between ``backward()`` and ``step()``, or from ``on_clip``, to see which layer explodes; after
        the step the gradients are the clipped ones.  With a GradScaler call its ``unscale_()`` before.  Waits
        for an accelerator.  With a sharded model all ranks must call it, as they exchange the norms of their
        parts.
        """
        self._step.is_running()  # gives back what a step that ended in an exception has left
        names, present, norms = self._names.norms(self._order)
        values = norms.tolist() if isinstance(norms, Tensor) else norms
        named = zip(names, present, values, strict=True)
        found = {name: max(norm, 0.0) for name, has_gradient, norm in named if has_gradient}
        return dict(sorted(found.items(), key=lambda item: (math.isfinite(item[1]), -item[1])))

    def detach(self) -> None:
        """Take the clipper off its optimizer, which no longer clips.  The history stays readable.

        Raises:
            RuntimeError: if called during a step, from ``on_clip`` or a closure.
        """
        if self._step.is_running():
            raise RuntimeError("detach() was called during a step; call it after optimizer.step()")
        if self._hooks:
            _clipped_optimizers.discard(self.optimizer)
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    def __enter__(self) -> Clipper:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on exactly as an uninterrupted one, as plain data.

        The history is part of it, with all records that it keeps.
        """
        spikes = self._clipping.spikes
        return {
            "steps": self._state.number,
            "norm_type": self._order,
            "scope": self._scope,
            "thresholds": self._rule.state_dict(),
            "spikes": None if spikes is None else spikes.state_dict(),
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``; the arguments stay those of this clipper.

        Raises:
            TypeError: if ``state`` or a part of it is of a wrong type.
            ValueError: if ``state`` is not a clipper's, or its thresholds are of another kind or have learned
                from norms of another ``scope`` or ``norm_type``.
        """
        keys = ("steps", "norm_type", "scope", "thresholds", "history")
        arguments.saved("state", state, keys, "Clipper")
        steps = arguments.count("state['steps']", state["steps"], least=0)
        order = arguments.number("state['norm_type']", state["norm_type"])
        scope = arguments.option("state['scope']", state["scope"], get_args(Scope))
        arguments.saved("state['thresholds']", state["thresholds"], (), "Clipper")
        arguments.saved("state['history']", state["history"], (), "Clipper")
        learned_from, own = (scope, order), (self._scope, self._order)
        if state["thresholds"] and learned_from != own:
            raise ValueError(
                "the thresholds in `state` have learned from norms of (scope, norm_type) = "
                f"{learned_from}, but this clipper's are {own}; make it with the same ones"
            )
        History().load_state_dict(state["history"])  # refuses a wrong one before anything is changed
        spikes, of_spikes = self._clipping.spikes, state.get("spikes")  # not in what earlier versions saved
        if spikes is not None and of_spikes is not None:
            spikes.load_state_dict(of_spikes)
        self._rule.load_state_dict(state["thresholds"])
        self.history.load_state_dict(state["history"])
        self._state.number = steps

    def __getstate__(self) -> None:
        raise TypeError(
            "a Clipper can be neither copied nor pickled, as its optimizer's hooks cannot; attach a new one "
            "to the copied optimizer and load this one's state_dict()"
        )

    def __repr__(self) -> str:
        return (
            f"Clipper({type(self.optimizer).__name__}, max_norm={self._way or self._rule!r}, "
            f"norm_type={self._order}, "
            f"scope={self._scope!r}, nonfinite={self._nonfinite!r})"
        )

    # The optimizer's hooks

    # With the kernel others are called, written in C, which take the usual step in one go and leave any other
    # to these: in a training step every frame, line and object costs several times what it costs alone.

    def _before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._step.begin():
            return None
        self._state.went_short, self._rows, self._layers = False, [], None
        self._clipping.begin()
        if len(args) > 1 or kwargs:
            replaced = with_closure(type(self.optimizer).step, args, kwargs, self._clipped_after)
            if replaced is not None:
                return replaced
        try:
            self._clip(args, kwargs)
        except BaseException:
            self._step.fail()
            raise
        return None

    def _clipped_after(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        def closure_then_clip(*args: Any, **kwargs: Any) -> Any:
            self._step.take_back("again")
            loss = closure(*args, **kwargs)
            self._clip()
            return loss

        return closure_then_clip

    def _clip(self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        """Clip the gradients that are there now."""
        look = self._clipping.look()
        look.measure()
        if creates_state(self.optimizer, args, kwargs or {}, look.total_norm):
            return
        if self._layers_every and self._state.number % self._layers_every == 0:
            names, _, norms = self._names.norms(self._order)
            self._layers = names, norms
        self._rows.append(self._clipping.clip(self._state.number, look))

    def _after_step(self, *_: Any) -> None:
        # Only a step that was taken is in the history, and has used up its number.
        if not self._step.end():
            return
        if self._state.went_short:
            self._state.record()
            return
        rows, self._rows = self._rows, []
        if rows:
            for row in rows:
                self.history.append(*row)
            if self._clipping.spikes is not None:
                self._clipping.spikes.end()
            if self._layers is not None:
                self.history.layers.append(self._state.number, *self._layers)
                self._layers = None
            self._state.number += 1
