"""Clipping by hand, in float64, in rounds of one optimizer or of several, for the random trainings."""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from torchclip import AdaGC, Adaptive, BlockRMS, Percentile, RollingSigma, Value, ZScore, reference

INF = math.inf
Array = np.ndarray[Any, Any]
Act = Callable[[list[nn.Parameter]], None]
"""What user code does to the parameters, or to their copies."""


class Raised(Exception):
    """An exception of the user's."""


class Tie(Exception):
    """A norm is so close to a threshold that rounding decides whether it counts."""


def raise_(_: object) -> None:
    raise Raised


class TwiceTheMean:
    """A user's threshold; ``asked`` runs within each update."""

    asked: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self) -> None:
        self.norms: list[float] = []

    def update(self, norm: float) -> float:
        type(self).asked()
        if math.isfinite(norm):
            self.norms.append(norm)
        return 2 * float(np.mean(self.norms)) if self.norms else INF

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self.norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.norms = list(state["norms"])


def twice_the_mean(norms: list[float]) -> list[float]:
    finite = [norm for norm in norms if math.isfinite(norm)]
    return [2 * float(np.mean(finite)) if finite else INF]


def adagc(rows: list[dict[str, float]], order: float) -> dict[str, float]:
    """AdaGC's threshold of each parameter in the last step, given the norms of all in each step."""
    names = [*dict.fromkeys(name for row in rows for name in row)]
    norms = np.array([[row.get(name, -1.0) for name in names] for row in rows])
    found = reference.adagc_thresholds(norms, 1.5, 0.5, warmup=2, max_norm=2.0, norm_type=order)
    return {name: found[-1, names.index(name)] for name in rows[-1]}


LEARNED: dict[str, tuple[Callable[[], Any], Callable[..., Any]]] = {
    "percentile": (lambda: Percentile(60.0), lambda norms: reference.percentile_thresholds(norms, 60.0)),
    "zscore": (
        lambda: ZScore(warmup=3, threshold=1.0),
        lambda norms: reference.zscore_thresholds(norms, warmup=3, threshold=1.0),
    ),
    "percentile of a window": (
        lambda: Percentile(60.0, window=3),
        lambda norms: reference.percentile_thresholds(norms, 60.0, window=3),
    ),
    "rolling sigma": (
        lambda: RollingSigma(sigma=1.0, window=4, warmup=2),
        lambda norms: reference.rolling_sigma_thresholds(norms, sigma=1.0, window=4, warmup=2),
    ),
    "twice the mean": (TwiceTheMean, twice_the_mean),
    "adagc": (lambda: AdaGC(1.5, 0.5, warmup=2, max_norm=2.0), adagc),
}
RULES: dict[str, tuple[Callable[[], Any], Callable[[list[Array], list[Array]], object]]] = {
    "value": (lambda: Value(0.5), lambda _, grads: reference.clip_grad_value(grads, 0.5)),
    "block rms": (lambda: BlockRMS(0.5), lambda _, grads: reference.clip_grad_rms(grads, 0.5)),
    "adaptive": (lambda: Adaptive(0.5), lambda ps, grads: reference.clip_grad_adaptive(ps, grads, 0.5)),
}


class Held(NamedTuple):
    """A gradient, its key, and the weights that it belongs to."""

    key: int
    grad: Array
    weights: Array


class Group(NamedTuple):
    """A parameter group: its own threshold, or "none", and its gradients, or None where there is none."""

    name: str
    own: Any
    grads: list[Held | None]


class ClipSet(NamedTuple):
    """Gradients that are clipped together, by key, and the own threshold of their parameter group."""

    own: Any
    grads: dict[int, Array]


class Result(NamedTuple):
    """The expected result of a clipping: a record without its number, and the gradients by key."""

    total_norm: float
    max_norm: float
    clip_coef: float
    skipped: bool
    grads: dict[int, Array]
    clipped_norm: float = 0.0
    nonfinite: bool = False
    layers: tuple[float, ...] = ()


class ByHand:
    """Clips by hand, with the Clipper's arguments.

    Attributes:
        seen: the norms that each set of gradients has had, if a threshold learns from them; for AdaGC the
            norms of all parameters in each step.
        skips: how many steps in a row were skipped, by the argument that says so.
        then: the same, with the current step.
    """

    def __init__(
        self,
        rule: Any,
        scope: str,
        nonfinite: str,
        norm_type: float,
        skip_above: float | str | None,
        skip_loss_above: float | str | None,
        max_skips: int | None,
    ) -> None:
        self.rule, self.scope, self.nonfinite, self.order = rule, scope, nonfinite, norm_type
        self.skip_above, self.skip_loss_above = skip_above, skip_loss_above
        self.max_skips = INF if max_skips is None else max_skips
        self.seen: dict[str, list[Any]] = {}
        self.skips, self.then = Counter[str](), Counter[str]()

    def clip(self, groups: list[Group], step: int, loss: float | None) -> Result | None:
        """The result of a step; None if its gradients must be refused.

        Args:
            groups: the gradients of all parameter groups.
            step: the number of the step.
            loss: its loss.
        """
        skipped = self.skip(groups)
        total_norm, grads = skipped.total_norm, skipped.grads
        if skipped.nonfinite and self.must_raise():
            return None
        counted = self.counted(groups)
        limit, of_limit = self.limit(skipped, groups, loss)
        if of_limit is None:
            return skipped
        max_norms, coefs = [limit] * (limit < INF), dict[int, float]()
        smallest, of_rule = 1.0, set[int]()
        if self.nonfinite == "zero":
            grads = finite_parts(grads)
        sets = self.sets(groups)
        norms = {name: self.norm(each.grads.values()) for name, each in sets.items()}
        thresholds = self.thresholds(sets, norms, step)
        for name, (own, of_set) in sets.items():
            norm, max_norm = norms[name], thresholds[name]
            max_norms.append(max_norm)
            if own == "none":
                of_rule |= of_set.keys()
            coef = coefficient(max_norm, norm, learned=own == "none" and self.rule in LEARNED)
            coef = coef if own is None else float(np.minimum(coef, of_limit))
            smallest = float(np.minimum(smallest, coef))
            for key in of_set:  # parameters of several groups may share a gradient
                coefs[key] = float(np.minimum(coefs.get(key, 1.0), coef))
        with np.errstate(invalid="ignore"):
            for key, coef in coefs.items():
                grads[key] = grads[key] if coef == 1 else np.asarray(grads[key] * coef)
            if self.rule in RULES:
                weights = {
                    held.key: held.weights for each in groups for held in each.grads if held is not None
                }
                RULES[self.rule][1]([weights[key] for key in of_rule], [grads[key] for key in of_rule])
            after = np.float64(self.norm(grads[key] for key in counted))
            if self.rule in RULES:
                smallest = 1.0 if total_norm in (0, after) else float(np.minimum(1.0, after / total_norm))
        max_norm = min(max_norms, default=math.nan)
        return Result(total_norm, max_norm, smallest, False, grads, float(after), skipped.nonfinite)

    def skip(self, groups: list[Group]) -> Result:
        """The result of a step that is skipped."""
        grads = {held.key: held.grad for group in groups for held in group.grads if held is not None}
        nonfinite = not math.isfinite(self.norm(grads.values()))
        return Result(self.norm(self.counted(groups).values()), INF, 1.0, True, grads, nonfinite=nonfinite)

    def counted(self, groups: list[Group]) -> dict[int, Array]:
        """The gradients that are clipped; all if none are."""
        return {
            held.key: held.grad for group in not_exempt(groups) for held in group.grads if held is not None
        }

    def must_raise(self) -> bool:
        """Whether gradients that are not finite are refused."""
        is_full = self.skips["nonfinite"] >= self.max_skips
        return self.nonfinite == "error" or (self.nonfinite == "skip" and is_full)

    def limit(self, skipped: Result, groups: list[Group], loss: float | None) -> tuple[float, float | None]:
        """The limit of a step that is above it and yet taken, and its coefficient; None if it is skipped."""
        if self.nonfinite == "skip":
            self.count("nonfinite", skipped.nonfinite)
            if skipped.nonfinite:
                return INF, None
        norm = skipped.total_norm
        if self.nonfinite == "zero":
            norm = self.norm(finite_parts(self.counted(groups)).values())
        norm = norm if self.sets(not_exempt(groups)) else -1.0
        limit = self.judge("skip_above", self.skip_above, norm)
        of_loss = self.judge("skip_loss_above", self.skip_loss_above, loss)
        if limit is None or of_loss is None:
            return INF, None
        return limit, 1.0 if limit == INF else limit / norm

    def judge(self, argument: str, limit: Any, value: Any) -> float | None:
        """The limit that a norm, or a loss, is above in a step that is taken; None if the step is skipped.

        A value below 0 is none.
        """
        if limit is None:
            return INF
        if value < 0:
            self.count(argument, False)
            return INF
        limit = self.learn(argument, limit, value) if isinstance(limit, str) else limit
        if not math.isfinite(value):  # such a step is never taken instead, and does not count
            return None if value > limit else INF
        if abs(value - limit) < 1e-5 * value:  # such as of gradients that were clipped to the limit before
            raise Tie
        self.count(argument, value > limit and self.skips[argument] < self.max_skips)
        if value <= limit:
            return INF
        return None if self.then[argument] else float(limit)

    def count(self, argument: str, skipped: bool) -> None:
        self.then[argument] = self.skips[argument] + 1 if skipped else 0

    def norm(self, grads: Iterable[Array]) -> float:
        joint = np.concatenate([np.zeros(1), *(grad.ravel() for grad in grads)])
        return float(np.linalg.norm(joint, self.order))

    def sets(self, groups: list[Group]) -> dict[str, ClipSet]:
        """The sets that are clipped together, by name."""
        found: dict[str, ClipSet] = {}
        scope = "parameter" if self.rule == "adagc" else self.scope
        for group in groups:
            for j, held in enumerate(group.grads):
                name = f"{group.name}, parameter {j}" if scope == "parameter" else group.name
                if scope == "global" and group.own == "none":
                    name = "all"
                if held is not None and held.grad.size:  # else there is nothing to measure
                    found.setdefault(name, ClipSet(group.own, {})).grads[held.key] = held.grad
        if self.nonfinite != "zero":
            return found
        return {
            name: ClipSet(own, finite_parts(grads))
            for name, (own, grads) in found.items()
            if math.isfinite(self.norm(grads.values())) or any(g.any() for g in finite_parts(grads).values())
        }

    def thresholds(self, sets: dict[str, ClipSet], norms: dict[str, float], step: int) -> dict[str, float]:
        """The threshold of each set."""
        own = {name: each.own for name, each in sets.items() if each.own != "none"}
        found = {name: INF if max_norm is None else float(max_norm) for name, max_norm in own.items()}
        asked = {name: norm for name, norm in norms.items() if name not in found}
        if self.rule != "adagc":
            return found | {name: self.threshold(name, norm, step) for name, norm in asked.items()}
        first = {key: name for name in reversed(asked) for key in sets[name].grads}
        rows = self.seen.setdefault("adagc", [])
        rows.append({name: asked[name] for name in first.values()})  # once for a gradient of two optimizers
        return found | dict.fromkeys(asked, INF) | adagc(rows, self.order)

    def threshold(self, name: str, norm: float, step: int) -> float:
        """The threshold of a set without one of its own."""
        if self.rule in RULES:
            return INF
        if self.rule not in LEARNED:
            return float(self.rule(step) if callable(self.rule) else self.rule)
        return self.learn(name, self.rule, norm)

    def learn(self, name: str, rule: str, norm: float) -> float:
        """What a threshold answers that learns from a norm."""
        norms = self.seen.setdefault(name, [])
        norms.append(norm)
        found = float(LEARNED[rule][1](norms)[-1])
        # It learns from norms up to its threshold only, such as one that was clipped to it before.
        if rule == "rolling sigma" and abs(norm - found) < 1e-5 * norm:
            raise Tie
        return found


def coefficient(max_norm: float, norm: float, learned: bool) -> float:
    """The clip coefficient: with torch's 1e-6 beside a norm, unless the threshold is learned."""
    if max_norm == INF or (learned and norm == 0):
        return 1.0
    return float(np.minimum(1.0, max_norm / (norm if learned else norm + 1e-6)))  # NaN if the norm is


def not_exempt(groups: list[Group]) -> list[Group]:
    """The parameter groups that are clipped; all if none is."""
    return [group for group in groups if group.own is not None] or groups


def finite_parts(grads: dict[int, Array]) -> dict[int, Array]:
    return {key: np.where(np.isfinite(grad), grad, 0.0) for key, grad in grads.items()}


def numpy(tensor: Tensor) -> Array:
    # A copy, as torch cannot resize what NumPy shares.
    return tensor.detach().to(torch.float64, copy=True).numpy()


class Rounds:
    """Copies of optimizers, whose gradients are clipped by hand, once in each round.

    Attributes:
        records: the result and the loss of each finished round.
        stepped: the optimizers that have stepped in the open round.
        loss: the next round's.
        told: the results that ``on_clip`` must have been called with, and the norms after clipping.
    """

    def __init__(self, optimizers: list[torch.optim.SGD], fused: list[bool], hand: ByHand) -> None:
        self.optimizers, self.fused, self.hand = optimizers, fused, hand
        self.records: list[tuple[Result, float | None]] = []
        self.told: list[tuple[Result, list[float]]] = []
        self.stepped: set[int] = set()
        self.loss: float | None = None
        self._open: tuple[Result, float | None] | None = None
        self._learned: Any = {}  # before the open round
        self._skips: list[bool] = []
        self._hidden = defaultdict[int, dict[nn.Parameter, Tensor]](dict)  # gradients, from a closure
        # The parameters with a gradient that is newer than the clipping, or than the optimizer's step.
        self._new: list[set[int]] = [set() for _ in optimizers]

    def parameters_of(self, i: int) -> list[nn.Parameter]:
        return [p for group in self.optimizers[i].param_groups for p in group["params"]]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*{id(p): p for i in range(len(self.optimizers)) for p in self.parameters_of(i)}.values()]

    def norms(self) -> list[float]:
        """The norm of each parameter's gradient, optimizer by optimizer."""
        held = [p.grad for i in range(len(self.optimizers)) for p in self.parameters_of(i)]
        return [self.hand.norm([numpy(grad)]) for grad in held if grad is not None]

    def groups(self) -> list[Group]:
        """The parameter groups with their current gradients."""
        return [
            Group(
                f"optimizer {i}, group {j}",
                group.get("max_norm", "none"),
                [
                    None if p.grad is None else Held(id(p.grad), numpy(p.grad), numpy(p))
                    for p in group["params"]
                ],
            )
            for i, optimizer in enumerate(self.optimizers)
            for j, group in enumerate(optimizer.param_groups)
        ]

    @property
    def goes_on_after_a_failure(self) -> bool:
        """Whether a later step of the open round has failed, with the gradients that were clipped in it."""
        return self._open is not None and not self._open[0].skipped

    def has_gradients(self, parameters: Iterable[Tensor]) -> None:
        for i, new in enumerate(self._new):
            new.update({*map(id, self.parameters_of(i))} & {*map(id, parameters)})

    def has_new(self, i: int) -> bool:
        grads = [p.grad for p in self.parameters_of(i) if id(p) in self._new[i]]
        return any(grad is not None and bool(grad.any()) for grad in grads)

    def overflows(self, i: int) -> bool:
        return any(p.grad is not None and not bool(p.grad.isfinite().all()) for p in self.parameters_of(i))

    def step(
        self, i: int, closure: Act | None, user: Act | None, where: str, breaks: str, overflows: bool
    ) -> str:
        """Step, or return why the step must fail.

        Args:
            i: the optimizer.
            closure: what its closure does.
            user: what user code has done in the middle of the step; None if none has run.
            where: this user code: "on_clip", or "max_norm" and "update", which only raise.
            breaks: what fails after the clipping; "" for nothing.
            overflows: whether a GradScaler skips the step.
        """
        if overflows and not self.fused[i]:
            return ""  # the GradScaler does not call it
        if self.stepped and i not in self.stepped and not any(map(self.has_new, self.stepped)):
            if self.has_new(i):
                self.loss = None
                return "have changed since they were clipped"
            if closure is not None:
                self._call(i, closure)
                if self.has_new(i):
                    return "computed new gradients"
        else:
            self.close()
            if closure is not None:
                closure(self.parameters)
            if wrong := self._clip(user, where, overflows):
                return wrong
        if breaks:
            self._open = self._open if self.stepped else None
            return "Raised"
        assert self._open is not None
        if not self._open[0].skipped and not overflows:
            self.optimizers[i].step()
        self.stepped.add(i)
        self._skips.append(overflows)
        self._new[i] = set()
        if len(self.stepped) == len(self.optimizers):
            self.close()
        return ""

    def _call(self, i: int, closure: Act) -> None:
        """Call the closure of a later optimizer, from which the gradients of a skipped round are hidden.

        If it computes new gradients, the step fails, and old ones do not come back beside them.
        """
        assert self._open is not None
        if not self._open[0].skipped:
            closure(self.parameters)
            return
        self._hidden[i] = {p: p.grad for p in self.parameters_of(i) if p.grad is not None}
        for p in self._hidden[i]:
            p.grad = None
        try:
            closure(self.parameters)
        finally:
            for p, grad in self._hidden.pop(i).items():
                p.grad = grad if p.grad is None and not self.has_new(i) else p.grad

    def zero_grad(self, i: int, set_to_none: bool) -> None:
        self.optimizers[i].zero_grad(set_to_none)
        if set_to_none:
            self._hidden[i].clear()
        for grad in self._hidden[i].values():
            grad.zero_()

    def _clip(self, user: Act | None, where: str, overflows: bool) -> str:
        """Open a round; returns why it must fail."""
        learned, number = copy.deepcopy(self.hand.seen), len(self.records)
        self.hand.then = self.hand.skips.copy()
        loss, self.loss = self.loss, None
        if self.hand.skip_loss_above is not None and loss is None:
            return "clipper.loss = loss"
        groups, layers = self.groups(), self.norms()
        by_scaler = overflows and (len(self.optimizers) == 1 or self.hand.nonfinite == "error")
        if self.hand.nonfinite == "zero" and not by_scaler:
            for grad in (p.grad for p in self.parameters if p.grad is not None):
                grad.nan_to_num_(0.0, 0.0, 0.0)
        if user is not None and where != "on_clip":
            raise Raised  # before anything was learned
        result = self.hand.skip(groups) if by_scaler else self.hand.clip(groups, number, loss)
        if result is None:
            return "non-finite"
        result = result._replace(layers=tuple(layers))
        if not result.skipped:
            for grad in (p.grad for p in self.parameters if p.grad is not None):
                grad.copy_(torch.from_numpy(result.grads[id(grad)]))
        self.told.append((result, self.norms()))
        if user is not None:
            user(self.parameters)
        self._new, self._learned = [set() for _ in self.optimizers], learned
        self._open = result, loss
        return ""

    def close(self) -> None:
        if self._open is not None and self.stepped:
            result, loss = self._open
            if all(self._skips):  # by a GradScaler
                result = result._replace(max_norm=INF, clip_coef=1.0, skipped=True, clipped_norm=0.0)
            self.records.append((result, loss))
            self.hand.skips = self.hand.then
        self._open, self.stepped, self._skips = None, set(), []

    def state(self) -> Any:
        """The state in the middle of a round: everything but the round."""
        learned = self._learned if self.stepped else self.hand.seen
        return copy.deepcopy((self.records, learned, self.hand.skips))

    def load(self, state: Any) -> None:
        self._open, self.stepped, self._skips = None, set(), []
        self.records, self.hand.seen, self.hand.skips = copy.deepcopy(state)
