"""Clipping by hand, in float64, for the random trainings of a Clipper; and how these are run."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from torchclip import Percentile, RollingSigma, ZScore, reference

INF = math.inf
Array = np.ndarray[Any, Any]
Look = list[list[tuple[int, Array] | None]]
"""The gradients of each parameter group, each with a key; None for a missing one."""


class Raised(Exception):
    """An exception of the user's."""


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


LEARNED: dict[str, tuple[Callable[[], Any], Callable[[list[float]], Any]]] = {
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
}


class Result(NamedTuple):
    """The expected result of a step: a record without its number, and the gradients by key."""

    total_norm: float
    max_norm: float
    clip_coef: float
    skipped: bool
    grads: dict[int, Array]


class ByHand:
    """Clips by hand, with the Clipper's arguments and the norms that each set of gradients has had."""

    def __init__(
        self, rule: Any, scope: str, nonfinite: str, order: float = 2.0, skip_above: float | None = None
    ) -> None:
        self.rule, self.scope, self.nonfinite, self.order = rule, scope, nonfinite, order
        self.skip_above = skip_above
        self.seen: dict[str, list[float]] = {}

    def norm(self, grads: list[Array]) -> float:
        joint = np.concatenate([np.zeros(1), *(grad.ravel() for grad in grads)])
        return float(np.linalg.norm(joint, self.order))

    def sets(self, look: Look, owns: list[Any]) -> dict[str, tuple[dict[int, Array], Any]]:
        """The sets that are clipped together, each with its parameter group's threshold, or "none"."""
        found: dict[str, tuple[dict[int, Array], Any]] = {}
        for i, (group, own) in enumerate(zip(look, owns, strict=True)):
            for j, grad in enumerate(group):
                name = f"group {i}, parameter {j}" if self.scope == "parameter" else f"group {i}"
                if self.scope == "global" and own == "none":
                    name = "all"
                if grad is not None and grad[1].size:  # no elements to measure
                    found.setdefault(name, ({}, own))[0][grad[0]] = grad[1]
        return found

    def threshold(self, name: str, norm: float, step: int, asked: dict[str, float]) -> float:
        if self.rule not in LEARNED:
            return float(self.rule(step) if callable(self.rule) else self.rule)
        if name not in asked:
            norms = self.seen.setdefault(name, [])
            norms.append(norm)
            asked[name] = float(LEARNED[self.rule][1](norms)[-1])
        return asked[name]

    def judge(self, look: Look, owns: list[Any], step: int, asked: dict[str, float]) -> Result | None:
        """The gradients after clipping; None if they must be refused."""
        sets = self.sets(look, owns)
        everything = {grad[0]: grad[1] for group in look for grad in group if grad is not None}
        total = self.norm([*everything.values()])
        if not math.isfinite(total) and self.nonfinite == "error":
            return None
        if not math.isfinite(total) and self.nonfinite == "skip":
            return Result(total, INF, 1.0, True, everything)
        if self.skip_above is not None:
            zeroed = [np.where(np.isfinite(g), g, 0.0) for g in everything.values()]
            if (self.norm(zeroed) if self.nonfinite == "zero" else total) > self.skip_above:
                return Result(total, INF, 1.0, True, everything)
        coefs: dict[int, float] = {}
        limits = []
        smallest = 1.0
        for name, (grads, own) in sets.items():
            norm = self.norm([*grads.values()])
            if not math.isfinite(norm) and self.nonfinite == "zero":
                finite = [grad[np.isfinite(grad)] for grad in grads.values()]
                everything |= {k: np.where(np.isfinite(g), g, 0.0) for k, g in grads.items()}
                if not sum(map(len, finite)):
                    limits += [asked[name]] if name in asked else []  # from before user code ran
                    continue
                norm = self.norm(finite)
            learned = own == "none" and self.rule in LEARNED
            limit = INF if own is None else own
            if own == "none":
                limit = self.threshold(name, norm, step, asked)
            limits.append(limit)
            coef = 1.0
            if limit < INF and not (learned and norm == 0):
                coef = float(np.minimum(1.0, limit / (norm if learned else norm + 1e-6)))
            smallest = float(np.minimum(smallest, coef))
            for key in grads:
                coefs[key] = float(np.minimum(coefs.get(key, 1.0), coef))
        with np.errstate(invalid="ignore"):
            for key, coef in coefs.items():
                everything[key] = everything[key] if coef == 1 else everything[key] * coef
        return Result(total, min(limits, default=math.nan), smallest, False, everything)


def numpy(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy().copy()


def assert_close(found: list[Array], expected: list[Array], **close: Any) -> None:
    """In one comparison, which takes no longer than that of one small array."""
    assert [array.shape for array in found] == [array.shape for array in expected]
    if found:
        joint = [np.concatenate([array.ravel() for array in arrays]) for arrays in (found, expected)]
        np.testing.assert_allclose(joint[0], joint[1], **close)


@contextmanager
def broken(optimizer: torch.optim.Optimizer, what: str) -> Iterator[None]:
    """Makes a later hook raise, or the optimizer's own step."""

    def raise_(*_: Any, **__: Any) -> None:
        raise Raised

    with pytest.MonkeyPatch.context() as patch:
        if what == "step":
            patch.setattr(sys.modules["torch.optim.sgd"], "sgd", raise_)
        hook = optimizer.register_step_pre_hook(raise_) if what == "hook" else None
        yield
        if hook is not None:
            hook.remove()


def run_each(training: Callable[[int, Callable[[str], None]], Any], seeds: Iterable[int], steps: int) -> None:
    """Runs a random training for each seed; one that fails prints what it did."""
    for seed in seeds:
        said: list[str] = []
        try:
            training(seed, said.append).run(steps)
        except BaseException:
            print(f"seed {seed}", *said, sep="\n")
            raise
