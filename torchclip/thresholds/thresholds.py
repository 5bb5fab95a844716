"""Thresholds that follow the run: the norms seen so far decide where to clip.

A threshold is any object with the three methods of ``Threshold``.  Once a step it is told the norm of
the gradients and answers with the ``max_norm`` to clip to.  This needs the norm as a Python float, so on an
accelerator every step waits for it; with a plain number as ``max_norm`` none does.
"""

from __future__ import annotations

import copy
import math
from array import array
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

from torch import Tensor

from torchclip._core import arguments

__all__ = ["MaxNorm", "MaxNormRule", "Percentile", "Threshold", "ZScore"]

ClipOption = Literal["adaptive_scaling", "mean", "percentile"]


@runtime_checkable
class Threshold(Protocol):
    """What a ``torchclip.Clipper`` asks of a threshold object; there is nothing to inherit from.

    In a distributed run every rank passes the same norms, so a threshold that decides by them alone gives the
    same answer everywhere.

    Examples:
        >>> class TwiceTheMean:
        ...     def __init__(self):
        ...         self.total, self.steps = 0.0, 0
        ...
        ...     def update(self, norm):
        ...         if math.isfinite(norm):
        ...             self.total, self.steps = self.total + norm, self.steps + 1
        ...         return 2 * self.total / self.steps if self.steps else math.inf
        ...
        ...     def state_dict(self):
        ...         return dict(vars(self))
        ...
        ...     def load_state_dict(self, state):
        ...         vars(self).update(state)
        >>> threshold = TwiceTheMean()
        >>> [threshold.update(norm) for norm in [1.0, 3.0, 14.0]]
        [2.0, 4.0, 12.0]
        >>> isinstance(threshold, Threshold)
        True
    """

    def update(self, norm: float) -> float:
        """Take in this step's norm and return this step's ``max_norm``.

        Args:
            norm: the norm before clipping; may be ``inf`` or ``nan``, which must leave no trace.

        Returns:
            The threshold for this step, at least 0; ``inf`` for a step that is not to be clipped.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything learned so far, as plain data (what ``json`` and ``torch.save`` take)."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where ``state_dict`` was taken."""
        ...


class Percentile:
    r"""Clip at a percentile of the norms so far: AutoClip.

    With the history ``H_t = {‖g_1‖, …, ‖g_t‖}``, which includes the current step's norm:

        max_norm_t = min(p-th percentile of H_t, max_norm)

    The percentile is exact, with linear interpolation as in ``numpy.percentile``.  Norms that are not
    finite do not enter the history; such a step gets the percentile of the norms before it.

    The history is kept sorted, so a step inserts one value instead of sorting again.  What that costs is
    moving the larger values up: with a history of 10,000 norms a step takes about 1 µs, with 100,000 norms
    4 µs, with a million 40 µs.  The memory is 8 bytes a norm, 40 with a ``window``.

    Twin: ``torchclip.reference.percentile_thresholds``.

    Args:
        percentile: between 0 (the smallest norm so far) and 100 (the largest: no clipping). Low values clip
            most steps, which is the method's intent; the paper recommends 10.
        window: how many of the latest norms count; ``None`` for all, as in the paper.
        warmup: so many finite norms are only learned from at first; these steps are clipped to ``max_norm``
            alone. The paper has no warm-up.
        max_norm: a hard ceiling for the threshold, in the warm-up too.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if an argument is out of its range.

    References:
        Seetharaman, Wichern, Pardo and Le Roux, *AutoClip: Adaptive Gradient Clipping for Source Separation
        Networks*, 2020, https://arxiv.org/abs/2007.14469

    Examples:
        >>> threshold = Percentile(50.0)
        >>> [threshold.update(norm) for norm in [1.0, 3.0, 100.0, math.nan]]
        [1.0, 2.0, 3.0, 3.0]
    """

    def __init__(
        self,
        percentile: float = 10.0,
        window: int | None = None,
        warmup: int = 0,
        max_norm: float = math.inf,
    ) -> None:
        self.percentile = _at_most("percentile", percentile, 100)
        self.window = None if window is None else arguments.count("window", window, least=1)
        self.warmup = arguments.count("warmup", warmup, least=0)
        self.max_norm = arguments.threshold("max_norm", max_norm)
        self._seen = 0
        self._sorted = array("d")
        self._arrivals: deque[float] = deque()  # in order of arrival; stays empty without a window

    def update(self, norm: float) -> float:
        """Add ``norm`` to the history and return the threshold of this step."""
        norm = _norm(norm)
        warming_up = self._seen < self.warmup
        if math.isfinite(norm):
            self._seen += 1
            self._remember(norm)
        if warming_up or not self._sorted:
            return self.max_norm
        return min(_percentile(self._sorted, self.percentile), self.max_norm)

    def _remember(self, norm: float) -> None:
        insort(self._sorted, norm)
        if self.window is None:
            return
        self._arrivals.append(norm)
        if len(self._arrivals) > self.window:
            del self._sorted[bisect_left(self._sorted, self._arrivals.popleft())]

    def state_dict(self) -> dict[str, Any]:
        """The history, as plain data."""
        norms = self._sorted if self.window is None else self._arrivals
        return {"kind": "Percentile", "window": self.window, "seen": self._seen, "norms": list(norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``; the arguments stay those of this object.

        Raises:
            TypeError: if ``state`` or a part of it is of a wrong type.
            ValueError: if ``state`` is that of another kind of threshold or of another ``window``.
        """
        _check_state(state, "Percentile", ("window", "seen", "norms"))
        if state["window"] != self.window:
            raise ValueError(
                f"`state` was taken with window={state['window']}, but this is {self!r}; "
                "make the Percentile with the same window"
            )
        seen = arguments.count("state['seen']", state["seen"], least=0)
        norms = arguments.items("state['norms']", state["norms"], _finite)
        self._seen = seen
        self._sorted = array("d", sorted(norms))
        self._arrivals = deque(norms if self.window is not None else ())

    def __repr__(self) -> str:
        return (
            f"Percentile(percentile={self.percentile}, window={self.window}, warmup={self.warmup}, "
            f"max_norm={self.max_norm})"
        )


class ZScore:
    r"""Pull back the steps whose norm is far above its running mean: ZClip.

    A norm ``g`` is a spike if its z-score against the mean ``μ`` and standard deviation ``σ`` of the steps
    before it is above the threshold: ``z = (g - μ) / σ > z*``.  A spike is clipped to ``g*``, which depends
    on ``clip_option``:

        "adaptive_scaling":   g* = μ + (z*² / z) σ      the larger the spike, the closer to the mean
        "mean":               g* = μ
        "percentile":         g* = μ + z* σ             the largest norm that is no spike

    Other steps are not clipped: their threshold is ``μ + z* σ``.  Then ``μ`` and ``σ`` learn from the step, a
    spike counting with ``g*`` in place of ``g``:

        μ ← α μ + (1 - α) g          σ² ← α σ² + (1 - α) (g - μ)²

    They start as the mean and the standard deviation of the norms of the warm-up.  A norm that is not finite
    gets ``μ + z* σ`` and is not learned from.  The ceiling ``max_norm`` limits the answer only: what is
    learned does not depend on it.

    The authors' code adds a small constant to ``σ`` against division by zero.  Here no division can meet a
    zero, so there is none, and norms scaled by a factor get thresholds scaled by that factor.

    Twin: ``torchclip.reference.zscore_thresholds``.

    Args:
        alpha: ``α``, how much of the mean and variance is kept each step, between 0 and 1.
        threshold: ``z*``, the z-score above which a norm is a spike, at least 0.
        warmup: how many finite norms the mean and variance start from, at least 1; these steps are clipped to
            ``max_norm`` alone.
        clip_option: what spikes are clipped to (above). The authors' code calls the first two options of
            ``mode="zscore"``, and the third a ``mode`` of its own.
        skip_update_on_spike: learn nothing from spikes. If norms rise for good, every step is then a spike
            and the mean never follows.
        max_norm: a hard ceiling for the threshold, in the warm-up too.

    Raises:
        TypeError: if an argument is not a number.
        ValueError: if an argument is out of its range, or ``clip_option`` is unknown.

    References:
        Kumar, Owen, Chowdhury and Güra, *ZClip: Adaptive Spike Mitigation for LLM Pre-Training*, 2025,
        https://arxiv.org/abs/2504.02507

    Examples:
        >>> threshold = ZScore(threshold=2.0, warmup=2)
        >>> [threshold.update(norm) for norm in [1.0, 3.0, 10.0]]  # μ = 2, σ = 1, so z = 8
        [inf, inf, 2.5]
    """

    def __init__(
        self,
        alpha: float = 0.97,
        threshold: float = 2.5,
        warmup: int = 25,
        clip_option: ClipOption = "adaptive_scaling",
        skip_update_on_spike: bool = False,
        max_norm: float = math.inf,
    ) -> None:
        self.alpha = _at_most("alpha", alpha, 1)
        self.threshold = arguments.threshold("threshold", threshold)
        if math.isinf(self.threshold):
            raise ValueError(
                "`threshold` is inf, so no step would be clipped; pass a finite z-score such as 2.5"
            )
        self.warmup = arguments.count("warmup", warmup, least=1)
        self.clip_option: ClipOption = arguments.option("clip_option", clip_option, get_args(ClipOption))
        self.skip_update_on_spike = arguments.flag("skip_update_on_spike", skip_update_on_spike)
        self.max_norm = arguments.threshold("max_norm", max_norm)
        self._warmup_norms: list[float] = []
        self._mean: float | None = None  # None until the warm-up is over
        # The deviation, not the variance: squares of large norms would overflow.
        self._std = 0.0

    def update(self, norm: float) -> float:
        """Judge ``norm`` by the steps before it, learn from it, and return the threshold of this step."""
        norm = _norm(norm)
        if self._mean is None:
            if math.isfinite(norm):
                self._warm_up(norm)
            return self.max_norm
        mean, margin = self._mean, self.threshold * self._std
        max_norm = mean + margin
        if math.isfinite(norm):
            spike = norm > max_norm
            if spike:
                max_norm = norm = self._pulled_back(norm, mean, margin)
            if not (spike and self.skip_update_on_spike):
                self._learn(norm, mean)
        return min(max_norm, self.max_norm)

    def _pulled_back(self, norm: float, mean: float, margin: float) -> float:
        if self.clip_option == "adaptive_scaling":
            # z*²/z · σ, written without squares; norm - mean is above margin, hence above 0.
            return mean + margin * (margin / (norm - mean))
        return mean if self.clip_option == "mean" else mean + margin

    def _learn(self, norm: float, mean: float) -> None:
        self._mean = self.alpha * mean + (1 - self.alpha) * norm
        self._std = math.hypot(
            math.sqrt(self.alpha) * self._std, math.sqrt(1 - self.alpha) * (norm - self._mean)
        )

    def _warm_up(self, norm: float) -> None:
        norms = self._warmup_norms
        norms.append(norm)
        if len(norms) >= self.warmup:
            self._mean = mean = sum(n / len(norms) for n in norms)
            self._std = math.hypot(*[(n - mean) / math.sqrt(len(norms)) for n in norms])
            self._warmup_norms = []

    def state_dict(self) -> dict[str, Any]:
        """The mean and standard deviation, or the norms of an unfinished warm-up, as plain data."""
        return {
            "kind": "ZScore",
            "mean": self._mean,
            "std": self._std,
            "warmup_norms": list(self._warmup_norms),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``; the arguments stay those of this object.

        Raises:
            TypeError: if ``state`` or a part of it is of a wrong type.
            ValueError: if ``state`` is that of another kind of threshold.
        """
        _check_state(state, "ZScore", ("mean", "std", "warmup_norms"))
        mean = None if state["mean"] is None else _finite("state['mean']", state["mean"])
        std = _finite("state['std']", state["std"])
        norms = arguments.items("state['warmup_norms']", state["warmup_norms"], _finite)
        self._mean, self._std, self._warmup_norms = mean, std, norms

    def __repr__(self) -> str:
        return (
            f"ZScore(alpha={self.alpha}, threshold={self.threshold}, warmup={self.warmup}, "
            f"clip_option={self.clip_option!r}, skip_update_on_spike={self.skip_update_on_spike}, "
            f"max_norm={self.max_norm})"
        )


MaxNorm: TypeAlias = float | Threshold | Callable[[int], float]


class MaxNormRule:
    """What a user passes as ``max_norm``, a number, a callable or a threshold object, asked in one way.

    A threshold object learns from one sequence of norms, so every set of gradients that is clipped on its own
    gets its own copy, made when it is first seen.

    Attributes:
        learns: whether it is a threshold object.
    """

    def __init__(self, max_norm: MaxNorm) -> None:
        if isinstance(max_norm, type):
            name = max_norm.__name__
            raise TypeError(f"`max_norm` is the class {name}; pass an object of it, such as {name}()")
        # Asked once: to ask a protocol takes longer than all the rest of a small step.
        self.learns = isinstance(max_norm, Threshold)
        is_object = self.learns or callable(max_norm)
        self._max_norm: Any = max_norm if is_object else arguments.threshold("max_norm", max_norm)
        self._copies: dict[str, Threshold] = {}

    @property
    def thresholds(self) -> Mapping[str, Threshold]:
        """The copies, by the name of the set."""
        return MappingProxyType(self._copies)

    def max_norms(self, step: int, names: Iterable[str], norms: Sequence[float | Tensor]) -> list[float]:
        """This step's threshold for each of the sets with these names and norms."""
        if self.learns:
            return [self._learned(name, float(norm)) for name, norm in zip(names, norms, strict=True)]
        max_norm = self._max_norm
        if not isinstance(max_norm, float):
            max_norm = arguments.threshold(f"max_norm({step})", max_norm(step))
        return [max_norm] * len(norms)

    def _learned(self, name: str, norm: float) -> float:
        if name not in self._copies:
            self._copies[name] = copy.deepcopy(self._max_norm)
        return arguments.threshold(
            f"{type(self._max_norm).__name__}.update()", self._copies[name].update(norm)
        )

    def state_dict(self) -> dict[str, Any]:
        """What the threshold objects have learned, by the name of the set."""
        return {name: threshold.state_dict() for name, threshold in self._copies.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``.

        Raises:
            ValueError: if ``state`` holds what another kind of threshold learned.
        """
        if state and not self.learns:
            raise ValueError(
                f"`state` holds what a threshold object learned, but `max_norm` is {self._max_norm!r}; pass "
                "the same kind of threshold object as in the saved run"
            )
        copies: dict[str, Any] = {name: copy.deepcopy(self._max_norm) for name in state}
        for name, threshold in copies.items():
            threshold.load_state_dict(state[name])
        self._copies = copies

    def __repr__(self) -> str:
        return repr(self._max_norm)


def _percentile(ordered: array[float], percentile: float) -> float:
    """The percentile of sorted values, rounded as NumPy rounds it."""
    position = (len(ordered) - 1) * (percentile / 100)
    below = int(position)
    t = position - below
    low, high = ordered[below], ordered[min(below + 1, len(ordered) - 1)]
    return low + (high - low) * t if t < 0.5 else high - (high - low) * (1 - t)


def _at_most(name: str, value: Any, most: float) -> float:
    number = arguments.number(name, value)
    if not 0 <= number <= most:
        raise ValueError(f"`{name}` must be between 0 and {most}, got {arguments.shown(value)}")
    return number


def _norm(value: Any) -> float:
    norm = value if type(value) is float else arguments.number("norm", value)
    if -math.inf < norm < 0:
        raise ValueError(f"`norm` must be at least 0, got {arguments.shown(value)}")
    return norm


def _finite(name: str, value: Any) -> float:
    norm = arguments.threshold(name, value)
    if math.isinf(norm):
        raise ValueError(f"`{name}` must be finite, got {arguments.shown(value)}")
    return norm


def _check_state(state: Mapping[str, Any], kind: str, keys: tuple[str, ...]) -> None:
    arguments.saved("state", state, ["kind"], kind)
    if state["kind"] != kind:
        raise ValueError(
            f"`state` was taken from a threshold of kind {state['kind']!r}; a {kind} cannot go on from it"
        )
    arguments.saved("state", state, keys, kind)
