"""Clipping that belongs to the optimizer: said once, done before every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchclip import arguments, eager, gradients
from torchclip.clip import clip_coefficient
from torchclip.combine import combine, combine_tensors
from torchclip.history import History, Record
from torchclip.norm import refuse_nonfinite, result_dtype
from torchclip.thresholds import MaxNorm, MaxNormRule

__all__ = ["Clipper"]

Scope = Literal["global", "group", "parameter"]
Nonfinite = Literal["propagate", "error", "skip", "zero"]
Norm: TypeAlias = float | Tensor

_REMEDY = "To go on, use `nonfinite='skip'` (leave such steps out) or 'zero' (put 0 in their place)"
_FLOAT32_MAX = torch.finfo(torch.float32).max
_clipped_optimizers: WeakSet[Optimizer] = WeakSet()


class _Set:
    """Gradients that share a threshold, clipped together (one norm) or each on its own (a norm for each).

    ``max_norm`` is the threshold that the parameter group brings along, or None.
    """

    def __init__(
        self, name: str, parameters: list[Tensor], max_norm: float | None, order: float, each: bool
    ) -> None:
        self.max_norm = max_norm
        self.batch = gradients.of_parameters(parameters)
        gradients.refuse_expanded(self.batch.rest)
        self._order, self._each = order, each
        self.names = [name]
        if each:
            self.names = [f"{name}, parameter {i}" for i, p in enumerate(parameters) if p.grad is not None]
        self.norms: list[Norm] = []
        self.measure(None)

    def measure(self, grad_scale: Tensor | None) -> None:
        """Take the norms of the gradients as they are now, divided by a GradScaler's scale."""
        norms = (
            gradients.norms(self.batch, self._order)
            if self._each
            else [gradients.norm(self.batch, self._order)]
        )
        self.norms = norms if grad_scale is None else [_divided(n, grad_scale) for n in norms]

    def scale_(self, factors: Sequence[Norm]) -> None:
        """Multiply the gradients in place."""
        if self._each:
            gradients.scale_each_(self.batch, factors)
        else:
            gradients.scale_(self.batch, factors[0])


class Clipper:
    r"""Clips the gradients of an optimizer before every step it takes.

    Say once how to clip, then only call ``optimizer.step()``::

        optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
        clipper = torchclip.Clipper(optimizer, max_norm=1.0)

    This works with closures (clipping follows the closure's backward pass, each time), gradient
    accumulation, learning rate schedulers, and :class:`torch.amp.GradScaler`: norms and thresholds are those
    of the unscaled gradients.  Fused optimizers get the coefficient as their ``grad_scale`` and multiply it
    in while they step, so that no pass over the gradients is spent on it; afterwards ``p.grad`` is the
    clipped gradient as usual.

    A parameter group may carry its own ``max_norm``: it is then clipped on its own, with it, and ``None``
    leaves it unclipped. Like a learning rate it may change during training::

        head = {"params": model.head.parameters(), "max_norm": 0.1}
        optimizer = torch.optim.SGD([{"params": model.body.parameters()}, head], lr=0.1)

    Copies and pickles of the optimizer do not clip, as they have no hooks; attach a new clipper to them and
    load its :meth:`state_dict`.

    Args:
        optimizer: any :class:`torch.optim.Optimizer`.  Names of parameters, in errors and :meth:`norms`, are
            known if it was made from ``model.named_parameters()``.
        max_norm: the threshold: a number (``float("inf")`` only measures), a threshold object such as
            :class:`Percentile`, or a callable that is given the number of the step, from 0.
        norm_type: the order of the norm, any number or ``"inf"``.
        scope: what is clipped together: ``"global"``, all parameters; ``"group"``, each parameter group;
            ``"parameter"``, each parameter. With the last two, a threshold object is copied for each of them.
        nonfinite: what to do about a norm that is ``inf`` or ``nan``. ``"propagate"``: nothing, as torch.
            ``"error"``: raise, naming the parameters, before anything changes. ``"skip"``: this step changes
            neither parameters nor optimizer state. ``"zero"``: non-finite elements become 0, and the rest is
            clipped.
        on_clip: called with the :class:`Record` of every step, just before the step is taken.  On an
            accelerator this waits for the norm.

    Attributes:
        history (History): what clipping did, step by step; reading it is what waits for an accelerator.

    Raises:
        TypeError: if ``optimizer`` is no optimizer, or ``max_norm`` is none of the above.
        ValueError: if ``max_norm`` is negative or NaN, ``scope`` or ``nonfinite`` unknown, the optimizer
            already has a clipper, or ``"skip"`` is asked of LBFGS, whose steps cannot be skipped half-way.

    Example:
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
        on_clip: Callable[[Record], object] | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"`optimizer` must be a torch.optim.Optimizer, got {arguments.shown(optimizer)}")
        if optimizer in _clipped_optimizers:
            raise ValueError("`optimizer` already has a Clipper; call its detach() first")
        _check_option("scope", scope, get_args(Scope))
        _check_option("nonfinite", nonfinite, get_args(Nonfinite))
        if nonfinite == "skip" and isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "`nonfinite='skip'` cannot be had with LBFGS, which moves the parameters several times in a "
                "step; use 'error' or 'zero'"
            )
        if on_clip is not None and not callable(on_clip):
            raise TypeError(f"`on_clip` must be callable, got {arguments.shown(on_clip)}")
        self.optimizer = optimizer
        self.history = History()
        self._rule = MaxNormRule(max_norm)
        self._order = arguments.norm_order(norm_type)
        self._scope = scope
        self._nonfinite = nonfinite
        self._on_clip = on_clip
        self._steps = 0
        self._undo: list[Callable[[], None]] = []
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )
        _clipped_optimizers.add(optimizer)

    @property
    def last(self) -> Record | None:
        """The record of the latest step, or None before the first."""
        return self.history[-1] if len(self.history) else None

    def norms(self) -> dict[str, float]:
        """The norm of each gradient as it is now, by the name of its parameter, largest first.

        Call it between ``backward()`` and ``step()`` to see which layer explodes; after the step the
        gradients are the clipped ones.  Waits for an accelerator.
        """
        batch = gradients.of_parameters([p for _, p in self._named_parameters()])
        of_grad = {
            id(g): float(n) for g, n in zip(batch.all, gradients.norms(batch, self._order), strict=True)
        }
        found = {name: of_grad[id(p.grad)] for name, p in self._named_parameters()}
        return dict(sorted(found.items(), key=lambda item: (math.isfinite(item[1]), -item[1])))

    def detach(self) -> None:
        """Take the clipper off its optimizer, which no longer clips.  The history stays readable."""
        self._take_back()
        for hook in self._hooks:
            hook.remove()
        _clipped_optimizers.discard(self.optimizer)

    def __enter__(self) -> Clipper:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on exactly as an uninterrupted one, as plain data."""
        return {
            "steps": self._steps,
            "thresholds": self._rule.state_dict(),
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`; the arguments stay those of this clipper.

        Raises:
            ValueError: if ``state`` is not a clipper's, or its thresholds are of another kind.
        """
        if not {"steps", "thresholds", "history"} <= state.keys():
            found = ", ".join(map(repr, state)) or "nothing"
            raise ValueError(f"`state` holds {found}; pass what Clipper.state_dict() returned")
        self._rule.load_state_dict(state["thresholds"])
        self.history.load_state_dict(state["history"])
        self._steps = state["steps"]

    def __repr__(self) -> str:
        return (
            f"Clipper({type(self.optimizer).__name__}, max_norm={self._rule!r}, norm_type={self._order}, "
            f"scope={self._scope!r}, nonfinite={self._nonfinite!r})"
        )

    # The optimizer's hooks

    def _before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs["closure"] if "closure" in kwargs else args[1] if len(args) > 1 else None
        if closure is None:
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
        self._take_back()
        self._steps += 1

    def _take_back(self) -> None:
        """Undo what was arranged for one step only."""
        while self._undo:
            self._undo.pop()()

    # One clipping

    def _clip(self) -> None:
        """Clip the gradients that are there now, and record it."""
        self._take_back()  # what a step that ended in an exception has left
        grad_scale = getattr(self.optimizer, "grad_scale", None)
        sets = list(self._sets())
        if grad_scale is not None:
            for each in sets:
                each.measure(grad_scale)
        total_norm = _joint([n for s in sets for n in s.norms], self._order)
        skipped = self._skipped(total_norm)
        max_norm: float = math.inf
        clip_coef: Norm = 1.0
        if skipped is not True:
            self._treat_nonfinite(sets, total_norm, grad_scale)
            max_norms = [self._max_norms(s) for s in sets]
            factors = [
                [clip_coefficient(m, n) for m, n in zip(of_set, s.norms, strict=True)]
                for of_set, s in zip(max_norms, sets, strict=True)
            ]
            self._apply(sets, factors, grad_scale)
            max_norm = min((m for of_set in max_norms for m in of_set), default=max_norm)
            clip_coef = _joint([f for of_set in factors for f in of_set], -math.inf) if sets else clip_coef
        elif self._nonfinite == "skip":
            self._hide_gradients()
        self.history.append(self._steps, total_norm, max_norm, clip_coef, skipped)
        if self._on_clip is not None:
            self._on_clip(self.history[-1])

    def _sets(self) -> Iterator[_Set]:
        """The gradients, parted by what shares a threshold."""
        each = self._scope == "parameter"
        together: list[Tensor] = []
        for i, group in enumerate(self.optimizer.param_groups):
            parameters = group["params"]
            if "max_norm" in group:
                if group["max_norm"] is not None:
                    own = arguments.threshold(f"param_groups[{i}]['max_norm']", group["max_norm"])
                    yield _Set(f"group {i}", parameters, own, self._order, each)
            elif self._scope == "global":
                together = together + parameters if together else parameters
            else:
                yield _Set(f"group {i}", parameters, None, self._order, each)
        if together:
            yield _Set("all", together, None, self._order, each)

    def _skipped(self, total_norm: Norm) -> bool | Tensor:
        """Whether this step changes nothing: by a GradScaler's decision, or by ours."""
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None:
            found: Tensor = found_inf > 0
            return bool(found) if eager.on_host([found]) else found
        return self._nonfinite == "skip" and not math.isfinite(total_norm)

    def _treat_nonfinite(self, sets: Sequence[_Set], total_norm: Norm, grad_scale: Tensor | None) -> None:
        if self._nonfinite == "error":
            names = {id(p.grad): name for name, p in self._named_parameters()}
            grads = [grad for each in sets for grad in each.batch.all]
            refuse_nonfinite(total_norm, self._order, grads, names, _REMEDY)
        elif self._nonfinite == "zero":
            for each in sets:
                # On an accelerator nobody waits to know whether it is needed.
                if any(isinstance(n, Tensor) or not math.isfinite(n) for n in each.norms):
                    eager.zero_nonfinite_(each.batch.all)
                    each.measure(grad_scale)

    def _max_norms(self, of: _Set) -> list[float]:
        if of.max_norm is not None:
            return [of.max_norm] * len(of.norms)
        return self._rule.max_norms(self._steps, of.names, of.norms)

    def _apply(
        self, sets: Sequence[_Set], factors: Sequence[Sequence[Norm]], grad_scale: Tensor | None
    ) -> None:
        """Multiply the gradients by their factors: now, or within a fused step, as its ``grad_scale``."""
        if self._fused(sets):
            ((factor,),) = factors
            if isinstance(factor, float) and factor == 1.0:
                return
            fused_scale = _fused_scale(factor, grad_scale)
            if fused_scale is not None:
                self._lend_grad_scale(fused_scale)
                return
        for each, of_set in zip(sets, factors, strict=True):
            each.scale_(of_set)

    def _fused(self, sets: Sequence[_Set]) -> bool:
        """Whether one factor for all gradients can go along with the step.

        Optimizers say by ``_step_supports_amp_scaling`` that they divide by a ``grad_scale``, for GradScaler.
        It is a float32 number, too coarse for gradients in float64.
        """
        groups = self.optimizer.param_groups
        return (
            getattr(self.optimizer, "_step_supports_amp_scaling", False)
            and all(group.get("fused") for group in groups)
            and len(sets) == 1
            and self._scope != "parameter"
            and (len(groups) == 1 or not any("max_norm" in group for group in groups))
            and result_dtype(sets[0].batch) == torch.float32
        )

    def _lend_grad_scale(self, value: Tensor) -> None:
        """Set the optimizer's ``grad_scale`` for this step only."""
        attributes = self.optimizer.__dict__
        had, before = "grad_scale" in attributes, attributes.get("grad_scale")

        def take_back() -> None:
            if had:
                attributes["grad_scale"] = before
            elif attributes["grad_scale"] is value:
                del attributes["grad_scale"]
            else:
                # The step ended in an exception, and a GradScaler has multiplied its scale by ours since.
                attributes["grad_scale"] = attributes["grad_scale"] / value

        attributes["grad_scale"] = value
        self._undo.append(take_back)

    def _hide_gradients(self) -> None:
        """Let this step see no gradients, so that it changes neither parameters nor state."""
        for _, parameter in list(self._named_parameters()):
            grad, parameter.grad = parameter.grad, None
            self._undo.append(lambda p=parameter, g=grad: setattr(p, "grad", g))  # type: ignore[misc]

    def _named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters that have a gradient, by the name that the optimizer knows, or their place in it."""
        for i, group in enumerate(self.optimizer.param_groups):
            for j, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    known = group.get("param_names")
                    yield known[j] if known else f"param_groups[{i}]['params'][{j}]", parameter


def _joint(values: Sequence[Norm], p: float) -> Norm:
    """The norm of order ``p`` of several numbers, some of them perhaps on an accelerator."""
    if len(values) == 1:
        return values[0]
    device = next((v.device for v in values if isinstance(v, Tensor)), None)
    if device is None:
        return combine(values, p)  # type: ignore[arg-type]
    on_device = [torch.as_tensor(v, dtype=torch.float64, device=device) for v in values]
    return combine_tensors(torch.stack(on_device), p)


def _divided(norm: Norm, grad_scale: Tensor) -> Norm:
    return norm / grad_scale.to(norm) if isinstance(norm, Tensor) else norm / float(grad_scale)


def _fused_scale(factor: Norm, grad_scale: Tensor | None) -> Tensor | None:
    """What a fused step must divide the gradients by; None if that is beyond float32."""
    scale = 1.0 if grad_scale is None else grad_scale
    if isinstance(factor, Tensor):
        return (scale / factor).to(torch.float32)
    divisor = float(scale) / factor if factor else math.inf
    if factor and divisor > _FLOAT32_MAX:
        return None
    return torch.tensor(divisor, dtype=torch.float32)


def _check_option(name: str, value: object, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, options))}, got {value!r}")
