"""Clipping that belongs to the optimizer: said once, done before every step."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torchclip._core import arguments, gather, memory, mesh
from torchclip._core.batch import Facts
from torchclip._core.scalars import clip_coef as clip_coefficient
from torchclip._core.scalars import join, refuse_nonfinite
from torchclip.history.history import History
from torchclip.history.records import Record, as_records
from torchclip.thresholds.base import MaxNorm, MaxNormRule, Threshold

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Clipper"]

Scope = Literal["global", "group", "parameter"]
Nonfinite = Literal["propagate", "error", "skip", "zero"]
Norm: TypeAlias = float | Tensor

_REMEDY = "To go on, use `nonfinite='skip'` (leave such steps out) or 'zero' (put 0 in their place)"
_FLOAT32_MAX = torch.finfo(torch.float32).max
# So many elements are multiplied by the kernel, in the cache, sooner than a fused step does it.
_SMALL = 1 << 19
_CPU = torch.device("cpu")
_clipped_optimizers: WeakSet[Optimizer] = WeakSet()


class _Set:
    """Gradients that share a threshold, clipped together (one norm) or each on its own (a norm for each).

    ``max_norm`` is the threshold that the parameter group brings along, or None.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[Tensor],
        max_norm: float | None,
        order: float,
        each: bool,
        group: Any,
    ) -> None:
        self.max_norm = max_norm
        self.batch = gather.gradients(parameters, group)
        self._name, self._parameters, self._order, self._each = name, parameters, order, each
        self._group = group
        self.norms: list[Norm] = []
        self.max_norms: list[float] = []
        self.factors: list[Norm] = []

    def names(self) -> Iterator[str]:
        """What to call the norms."""
        if not self._each:
            return iter([self._name])
        # Parameters may share a gradient, which is clipped once.
        names = {
            id(p.grad): f"{self._name}, parameter {i}"
            for i, p in enumerate(self._parameters)
            if p.grad is not None
        }
        return iter(names.values())

    def measure(self, grad_scale: Tensor | None, finite: bool = False) -> None:
        """Take the norms of the gradients, or of their finite elements, divided by a GradScaler's scale."""
        norms = (
            self.batch.norms(self._order, finite) if self._each else [self.batch.norm(self._order, finite)]
        )
        self.norms = [_unscaled(n, grad_scale, self._order) for n in norms]

    def joined_norms(self) -> list[Norm]:
        """The norms that the norm of all gradients is made of."""
        if self._order >= 0 or self._group is not None:
            return self.norms
        # For a negative order a norm of 0 means an element that is 0; without elements there is none.
        counts = [t.numel() for t in self.batch.all]
        return [
            n for n, count in zip(self.norms, counts if self._each else [sum(counts)], strict=True) if count
        ]

    def limit(self, max_norms: list[float], learned: bool) -> None:
        """Set the threshold of each norm.

        One that was learned may be the norm itself, which the formula for the coefficient would shorten.
        """
        self.max_norms = max_norms
        self.factors = [
            1.0 if learned and norm <= max_norm else clip_coefficient(max_norm, norm)
            for max_norm, norm in zip(max_norms, self.norms, strict=True)
        ]

    def scale_(self) -> None:
        """Multiply the gradients in place."""
        if self._each:
            self.batch.scale_each_(self.factors)  # type: ignore[arg-type]
        else:
            self.batch.scale_(self.factors[0])

    def is_small(self) -> bool:
        """Whether to multiply the gradients costs less than to let a fused step do it."""
        return _SMALL > 0 and bool(self.batch.facts & Facts.SMALL)

    def has_gaps(self) -> bool:
        """Whether a gradient has memory between its elements, which torch's fused steps on CPU write into."""
        return bool(self.batch.facts & Facts.GAPS)

    def shares_gradients(self) -> bool:
        """Whether a gradient belongs to several parameters, so that a step meets it several times."""
        return bool(self.batch.facts & Facts.SHARED)


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
    one it is recorded, as skipped.

    Args:
        optimizer: any ``torch.optim.Optimizer``.  Names of parameters, in errors and ``norms``, are
            known if it was made from ``model.named_parameters()``.
        max_norm: the threshold: a number (``float("inf")`` only measures), a threshold object such as
            ``Percentile``, or a callable that is given the number of the step, from 0.  The object stays as
            it is; the copies that learn are in ``thresholds``. A norm up to such an object's threshold is
            left alone exactly; at a number the 1e-6 of ``clip_grad_norm_`` counts.
        norm_type: the order of the norm, any number or ``"inf"``.
        scope: what is clipped together: ``"global"``, all parameters; ``"group"``, each parameter group;
            ``"parameter"``, each parameter. Each of them gets its own copy of a threshold object.
        nonfinite: what to do about a norm that is ``inf`` or ``nan``. ``"propagate"``: nothing, as torch.
            ``"error"``: raise, naming the parameters, before anything changes (but for what LBFGS did in
            the same step before). ``"skip"``: this step changes neither parameters nor optimizer state; it
            does not see the gradients, which are there again after it. ``"zero"``: non-finite elements become
            0, and the rest is clipped.
        group: a process group, or several, whose other ranks hold further gradients, as for
            ``clip_grad_norm_``; all ranks must have the same number of parameter groups.  DTensors need
            none.
        on_clip: called with the ``Record`` of every step, just before anything is changed and before it is
            in the history; an exception from it calls the step off, and only what a threshold object has
            learned stays.  On an accelerator this waits for the norm.

    Attributes:
        history (History): what clipping did, step by step; reading it is what waits for an accelerator.
            With several thresholds a ``Record`` holds the smallest of them and the smallest coefficient.
            To keep another number of records, assign ``torchclip.history.History(maxlen=...)`` before the
            first step.

    Raises:
        TypeError: if ``optimizer`` is no optimizer, or ``max_norm`` is none of the above.
        ValueError: if ``max_norm`` is negative or NaN, ``scope`` or ``nonfinite`` unknown, the optimizer
            already has a clipper, ``"skip"`` is asked of LBFGS, whose steps cannot be skipped half-way,
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
        max_norm: MaxNorm,
        *,
        norm_type: float | str = 2.0,
        scope: Scope = "global",
        nonfinite: Nonfinite = "propagate",
        group: ProcessGroup | Sequence[ProcessGroup] | None = None,
        on_clip: Callable[[Record], object] | None = None,
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
        if nonfinite == "skip" and isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "`nonfinite='skip'` does not work with LBFGS, which moves the parameters several times in a "
                "step; use 'error' or 'zero'"
            )
        if on_clip is not None and not callable(on_clip):
            raise TypeError(f"`on_clip` must be callable, got {arguments.shown(on_clip)}")
        self.optimizer = optimizer
        self.history = History()
        self._rule = MaxNormRule(max_norm)
        self._order = arguments.norm_order(norm_type)
        if self._order <= 0 and nonfinite != "propagate":
            raise ValueError(
                f"`nonfinite={nonfinite!r}` goes by the norm, which of order {self._order} may be finite "
                "though a gradient is not; pass an order above 0 as `norm_type`, or use 'propagate'"
            )
        self._scope = scope
        self._nonfinite = nonfinite
        self._group = mesh.as_groups(group) or None
        if self._group and scope == "parameter":
            raise ValueError(
                "`group` has no meaning with `scope='parameter'`, which clips every gradient by its norm: "
                "leave it out"
            )
        self._on_clip = on_clip
        self._steps = 0
        self._steps_as_torch = type(optimizer).step.__module__.startswith("torch.optim.")
        self._step_frame: FrameType | None = None
        self._undo: list[Callable[[bool], None]] = []
        self._hooks: tuple[RemovableHandle, ...] = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )
        _clipped_optimizers.add(optimizer)

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
        if not self._stepping(sys._getframe()):
            self._take_back()  # what a step that ended in an exception has left
        named = list(self._named_parameters())
        batch = gather.tensors([p.grad for _, p in named if p.grad is not None])
        grad_scale = getattr(self.optimizer, "grad_scale", None)
        of_grad = {
            id(g): float(_unscaled(n, grad_scale, self._order))
            for g, n in zip(batch.all, batch.norms(self._order), strict=True)
        }
        found = {name: of_grad[id(p.grad)] for name, p in named}
        return dict(sorted(found.items(), key=lambda item: (math.isfinite(item[1]), -item[1])))

    def detach(self) -> None:
        """Take the clipper off its optimizer, which no longer clips.  The history stays readable.

        Raises:
            RuntimeError: if called during a step, from ``on_clip`` or a closure.
        """
        if self._stepping(sys._getframe()):
            raise RuntimeError("detach() was called during a step; call it after optimizer.step()")
        self._take_back()
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
        return {
            "steps": self._steps,
            "norm_type": self._order,
            "scope": self._scope,
            "thresholds": self._rule.state_dict(),
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
        self._rule.load_state_dict(state["thresholds"])
        self.history.load_state_dict(state["history"])
        self._steps = steps

    def __getstate__(self) -> None:
        raise TypeError(
            "a Clipper can be neither copied nor pickled, as its optimizer's hooks cannot; attach a new one "
            "to the copied optimizer and load this one's state_dict()"
        )

    def __repr__(self) -> str:
        return (
            f"Clipper({type(self.optimizer).__name__}, max_norm={self._rule!r}, norm_type={self._order}, "
            f"scope={self._scope!r}, nonfinite={self._nonfinite!r})"
        )

    # The optimizer's hooks

    def _before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        caller = sys._getframe(1)
        if self._stepping(caller):
            return None
        self._step_frame = caller
        closure = kwargs["closure"] if "closure" in kwargs else args[1] if len(args) > 1 else None
        if not callable(closure):  # None, or what else the step() of a subclass takes
            self._take_back()
            self._clip()
            return None

        def closure_then_clip() -> Any:
            self._take_back()
            loss = closure()
            self._clip()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_clip}
        return (args[0], closure_then_clip, *args[2:]), kwargs

    def _after_step(self, *_: Any) -> None:
        if sys._getframe(1) is self._step_frame:
            self._step_frame = None
            self._take_back(finished=True)
            self._steps += 1

    def _stepping(self, frame: FrameType | None) -> bool:
        """Whether a frame lies within a step that has been clipped already.

        So it is when the ``step()`` of a subclass calls its parent's, which has the same hooks.  A step that
        ended in an exception has never reached the second hook, but no frame lies within it any more.
        """
        if self._step_frame is None:
            return False
        while frame is not None and frame is not self._step_frame:
            frame = frame.f_back
        return frame is not None

    def _take_back(self, finished: bool = False) -> None:
        """Undo what was arranged for one step only, which may have ended in an exception."""
        while self._undo:
            self._undo.pop()(finished)

    # One clipping

    def _clip(self) -> None:
        """Clip the gradients that are there now, and record it."""
        grad_scale = getattr(self.optimizer, "grad_scale", None)
        sets = list(self._sets())
        for each in sets:
            each.measure(grad_scale)
        norms = [n for s in sets for n in s.joined_norms()]
        total_norm = join(norms, self._order) if norms else 0.0
        skipped = self._skipped(total_norm)
        if skipped is True:
            self._record(total_norm, math.inf, 1.0, skipped)
            if self._nonfinite == "skip":
                self._hide_gradients()
            return
        to_zero: Sequence[_Set] = ()
        if self._nonfinite != "propagate":
            to_zero = self._treat_nonfinite(sets, total_norm, grad_scale)
        for each in sets:
            self._limit(each)
        max_norm = min([m for s in sets for m in s.max_norms], default=math.inf)
        factors = [f for s in sets for f in s.factors]
        clip_coef = join(factors, -math.inf) if factors else 1.0
        self._record(total_norm, max_norm, clip_coef, skipped)
        for each in to_zero:
            each.batch.zero_nonfinite_()
        if isinstance(clip_coef, Tensor) or clip_coef != 1.0:
            self._apply(sets, grad_scale)

    def _sets(self) -> Iterator[_Set]:
        """The gradients, parted by what shares a threshold."""
        each = self._scope == "parameter"
        together: list[Tensor] | None = None
        for i, group in enumerate(self.optimizer.param_groups):
            parameters = group["params"]
            if "max_norm" in group:
                own = group["max_norm"]
                max_norm = math.inf if own is None else arguments.threshold(_place(i, "max_norm"), own)
                yield _Set(f"group {i}", parameters, max_norm, self._order, each, self._group)
            elif self._scope == "global":
                together = together + parameters if together else parameters
            else:
                yield _Set(f"group {i}", parameters, None, self._order, each, self._group)
        # With none of them here, another rank of the group may still wait for this one.
        if together or (together is not None and self._group):
            yield _Set("all", together, None, self._order, each, self._group)

    def _skipped(self, total_norm: Norm) -> bool | Tensor:
        """Whether this step changes nothing: by a GradScaler's decision, or by ours."""
        found_inf = getattr(self.optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor):  # without any gradient GradScaler makes it the number 0
            # To raise an error, or not, is to wait for an accelerator.
            if self._nonfinite != "error" and not memory.on_host([found_inf]):
                skipped = found_inf > 0
                if self._nonfinite == "skip":
                    norm = torch.as_tensor(total_norm, device=found_inf.device)
                    skipped = skipped | ~norm.isfinite()
                    # To hide the gradients would be to wait; a fused step heeds this.
                    vars(self.optimizer)["found_inf"] = skipped.to(found_inf.dtype)
                return skipped
            if found_inf > 0:
                return True
        return self._nonfinite == "skip" and not math.isfinite(total_norm)

    def _treat_nonfinite(
        self, sets: Sequence[_Set], total_norm: Norm, grad_scale: Tensor | None
    ) -> Sequence[_Set]:
        """Raise the error, or return the sets with elements to be set to 0, measured as if they were."""
        if self._nonfinite == "error" and not math.isfinite(total_norm):
            names = {id(p.grad): name for name, p in self._named_parameters()}
            grads = [grad for each in sets for grad in each.batch.all]
            refuse_nonfinite(total_norm, self._order, grads, names, _REMEDY)
        if self._nonfinite != "zero":
            return ()
        # On an accelerator nobody waits to know whether it is needed.
        to_zero = [s for s in sets if any(isinstance(n, Tensor) or not math.isfinite(n) for n in s.norms)]
        for each in to_zero:
            each.measure(grad_scale, finite=True)
        return to_zero

    def _limit(self, each: _Set) -> None:
        if each.max_norm is not None:
            each.limit([each.max_norm] * len(each.norms), learned=False)
        elif self._rule.learns:
            norms = [float(norm) for norm in each.norms]
            answer = self._rule.max_norms(self._steps, list(each.names()), norms, self._order)
            each.limit(answer.tolist() if isinstance(answer, Tensor) else answer, learned=True)
        else:
            (max_norm,) = self._rule.max_norms(self._steps, ["all"], [0.0])
            each.limit([max_norm] * len(each.norms), learned=False)

    def _record(self, total_norm: Norm, max_norm: float, clip_coef: Norm, skipped: bool | Tensor) -> None:
        if self._on_clip is not None:
            (record,) = as_records([(self._steps, total_norm, max_norm, clip_coef, skipped)])
            self._on_clip(record)
            _, total_norm, max_norm, clip_coef, *_, skipped = record  # fetched already
        self.history.append(self._steps, total_norm, max_norm, clip_coef, skipped)

    def _apply(self, sets: Sequence[_Set], grad_scale: Tensor | None) -> None:
        """Multiply the gradients by their factors: now, or within a fused step, as its ``grad_scale``."""
        fused_scale = _fused_scale(sets[0].factors[0], grad_scale) if self._fused(sets) else None
        if fused_scale is not None:
            self._lend_grad_scale(fused_scale)
            return
        for each in sets:
            each.scale_()

    def _fused(self, sets: Sequence[_Set]) -> bool:
        """Whether one factor for all gradients can go along with the step.

        Optimizers say by ``_step_supports_amp_scaling`` that they divide by a ``grad_scale``, for GradScaler.
        It is a float32 number, too coarse for gradients in float64.  Whoever sees the gradients before the
        optimizer does, a later hook or the ``step()`` of a subclass, must find them clipped.
        """
        return (
            getattr(self.optimizer, "_step_supports_amp_scaling", False)
            and self._steps_as_torch
            and next(reversed(self.optimizer._optimizer_step_pre_hooks)) == self._hooks[0].id
            and all(group.get("fused") for group in self.optimizer.param_groups)
            and len(sets) == 1
            and self._scope != "parameter"
            and (isinstance(sets[0].norms[0], Tensor) or not sets[0].is_small())
            and not sets[0].batch.facts & Facts.DOUBLE
            and not sets[0].shares_gradients()
            and not sets[0].has_gaps()
        )

    def _lend_grad_scale(self, value: Tensor) -> None:
        """Set the optimizer's ``grad_scale`` for this step only."""
        attributes = vars(self.optimizer)
        had, before = "grad_scale" in attributes, attributes.get("grad_scale")

        def take_back(_: bool) -> None:
            now = attributes.get("grad_scale")
            if now is not None and now is not value:
                # The step ended in an exception, and a GradScaler has multiplied its scale by ours since.
                attributes["grad_scale"] = now / value
            elif had or "found_inf" in attributes:  # of a GradScaler, which deletes them itself
                attributes["grad_scale"] = before
            else:
                attributes.pop("grad_scale", None)

        attributes["grad_scale"] = value
        self._undo.append(take_back)

    def _hide_gradients(self) -> None:
        """Let this step see no gradients, so that it changes neither parameters nor state."""
        hidden = [(p, p.grad) for _, p in self._named_parameters() if p.grad is not None]
        attributes, zero_grad = vars(self.optimizer), self.optimizer.zero_grad
        before = attributes.get("zero_grad")

        def zero_hidden_too(set_to_none: bool = True) -> None:
            zero_grad(set_to_none)
            if set_to_none:
                hidden.clear()
            for _, grad in hidden:
                grad.detach().zero_()

        def take_back(finished: bool) -> None:
            if before is None:
                del attributes["zero_grad"]
            else:
                attributes["zero_grad"] = before
            # New ones after a step that ended in an exception: then the old ones, all of them, are history.
            if finished or all(parameter.grad is None for parameter, _ in hidden):
                for parameter, grad in hidden:
                    if parameter.grad is None:
                        parameter.grad = grad

        for parameter, _ in hidden:
            parameter.grad = None
        # A hook, or the step() of a subclass, may zero the gradients before the step is over.
        attributes["zero_grad"] = zero_hidden_too
        self._undo.append(take_back)

    def _named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters that have a gradient, by the name that the optimizer knows, or their place in it."""
        used = set()
        for i, group in enumerate(self.optimizer.param_groups):
            names = group.get("param_names", [None] * len(group["params"]))
            for j, (name, parameter) in enumerate(zip(names, group["params"], strict=True)):
                if parameter.grad is not None:
                    if name is None or name in used:  # as the names of two models may be
                        name = f"{_place(i, 'params')}[{j}]"
                    used.add(name)
                    yield name, parameter


def _place(group: int, key: str) -> str:
    return f"param_groups[{group}][{key!r}]"


def _unscaled(norm: Norm, grad_scale: Tensor | None, order: float) -> Norm:
    """The norm of gradients once a GradScaler's scale is taken out of them; order 0 only counts them."""
    if not isinstance(norm, Tensor):
        norm = max(norm, 0.0)
    if grad_scale is None or order == 0:
        return norm
    return norm / grad_scale.to(norm) if isinstance(norm, Tensor) else norm / float(grad_scale)


def _fused_scale(factor: Norm, grad_scale: Tensor | None) -> Tensor | None:
    """What a fused step must divide the gradients by; None if that is no finite float32."""
    scale = 1.0 if grad_scale is None else grad_scale
    if isinstance(factor, Tensor):
        return (scale / factor).to(torch.float32)
    divisor = float(scale) / factor if factor else math.inf
    return torch.scalar_tensor(divisor, dtype=torch.float32, device=_CPU) if divisor <= _FLOAT32_MAX else None
