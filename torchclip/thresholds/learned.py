"""What this package's thresholds have in common: a state, a formula, and columns of what they learn."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from torchclip._core import arguments
from torchclip._core.batch import Norms
from torchclip._core.scalars import ABSENT
from torchclip.thresholds import checks
from torchclip.thresholds.forms import ARRAYS, FLOATS, Tensors

Kind = TypeVar("Kind", bound="Learned")


class Saved(ABC):
    """An object whose state is plain data, which names its kind."""

    _kind: ClassVar[str]

    def state_dict(self) -> dict[str, Any]:
        """What was learned, as plain data."""
        return {"kind": self._kind, **self._state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict``; this object keeps its own arguments.

        Raises:
            TypeError: if ``state`` or a part of it is of a wrong type.
            ValueError: if ``state`` is that of another kind of threshold, or of another ``window``.
        """
        self._require(state, "kind")
        if state["kind"] != self._kind:
            owner = f"{'an' if self._kind[0] in 'AEIOU' else 'a'} {self._kind}"
            raise ValueError(
                f"`state` was taken from a threshold of kind {state['kind']!r}; {owner} cannot load it"
            )
        self._load(state)

    def _require(self, state: Mapping[str, Any], *keys: str) -> None:
        """Raise an error for a state that lacks a key."""
        arguments.saved("state", state, keys, self._kind)

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """The state without the kind."""

    @abstractmethod
    def _load(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of the right kind; nothing changes if a part of it is wrong."""


class Learned(Saved):
    """A threshold that learns by a formula.

    It keeps what it has learned in attributes, the columns.  In an object that a user makes, each is a
    number.  In ``Rows``, each has an entry for each of many sets, and the same formula updates all of them.
    """

    _columns: ClassVar[tuple[str, ...]]
    """The attributes that hold what was learned."""

    def update(self, norm: float) -> float:
        """Learn from ``norm`` and return the threshold of this step."""
        max_norm: float = self._learn(checks.norm(norm), FLOATS)
        return max_norm

    @abstractmethod
    def _learn(self, norms: Any, form: Any, order: float = 2.0) -> Any:
        """Learn from norms and return the thresholds.

        Args:
            norms: a norm, or an array or tensor with one for each set; negative where there is no gradient.
                Nothing is learned from these, nor from ``inf`` and ``nan``.
            form: the functions for this kind of number.
            order: the order of the norms, for rules that join them.
        """

    def copied(self: Kind) -> Kind:
        """An independent copy that has learned the same."""
        copied = copy.copy(self)
        for name in self._columns:
            value = getattr(self, name)
            setattr(copied, name, value.copy() if isinstance(value, list) else copy.deepcopy(value))
        return copied

    def _to_row(self, name: str, device: torch.device | None) -> Any:
        """The row, in host memory or on a device, for what was learned."""
        return getattr(self, name)

    def _from_row(self, name: str, value: Any) -> None:
        """Take what was learned from a row."""
        setattr(self, name, value)

    def _takes_rows(self, device: torch.device | None) -> bool:
        """Whether many sets can learn together: in host memory, or on a device without waiting for it."""
        return True


def has_own_update(kind: type) -> bool:
    """Whether a user's subclass has its own ``update``, which must be called for each norm."""
    for cls in kind.__mro__:
        if "_learn" in vars(cls) or "update" in vars(cls):
            return "_learn" not in vars(cls)
    return True


class Objects:
    """Thresholds of a few sets, or of a user's own kind: an object for each.

    Args:
        thresholds: the objects, by the names of their sets.

    Attributes:
        thresholds: likewise.
        sets: a dictionary by the names of the sets.
        selected: the names of the sets whose norms ``update`` takes.
    """

    device = None

    def __init__(self, thresholds: Mapping[str, Any]) -> None:
        self.thresholds = self.sets = dict(thresholds)
        self.selected: tuple[str, ...] | None = None
        self._updates: list[Callable[[float], float]] = []

    def copied(self) -> Objects:
        """Independent objects that have learned the same."""
        copies = {
            name: each.copied() if isinstance(each, Learned) else copy.deepcopy(each)
            for name, each in self.thresholds.items()
        }
        return Objects(copies)

    def add(self, thresholds: Mapping[str, Any]) -> None:
        """Add sets after those that are there."""
        self.thresholds.update(thresholds)

    def select(self, names: tuple[str, ...]) -> None:
        """Take the norms of the sets with these names from now on."""
        self.selected, self._updates = names, [self.thresholds[name].update for name in names]

    def update(self, norms: Sequence[float], order: float) -> list[float]:
        """Learn from the norms, negative where there is no gradient, and return the thresholds."""
        # A norm of -inf is not finite, but not absent.
        return [
            math.inf if -math.inf < norm < 0 else update(norm)
            for update, norm in zip(self._updates, norms, strict=True)
        ]


class Rows:
    """Thresholds of many sets, which learn together: a row for each in every column.

    Args:
        thresholds: the objects to start from, of the same kind with the same arguments, by the names of the
            sets.
        device: where the norms will be; None for numbers in host memory.

    Attributes:
        sets: the number of the row by the name of each set.
        selected: the names of the sets whose norms ``update`` takes.
    """

    def __init__(self, thresholds: Mapping[str, Learned], device: torch.device | None) -> None:
        self.device = device
        self.sets = {name: row for row, name in enumerate(thresholds)}
        self.selected: tuple[str, ...] | None = None
        self._rows: Any = None  # those of the selected sets, unless they are all rows in order
        self._form: Any = ARRAYS if device is None else Tensors(device)
        self._one = next(iter(thresholds.values()))
        self._all = self._stacked([*thresholds.values()])

    def _stacked(self, thresholds: Sequence[Learned]) -> Learned:
        stacked = copy.copy(self._one)
        for name in self._one._columns:
            values = [each._to_row(name, self.device) for each in thresholds]
            setattr(stacked, name, self._form.column(values))
        return stacked

    def copied(self) -> Rows:
        """Independent rows that have learned the same."""
        copied = copy.copy(self)
        copied._all, copied.sets = self._all.copied(), dict(self.sets)
        return copied

    def add(self, thresholds: Mapping[str, Learned]) -> None:
        """Add rows after those that are there."""
        self.sets.update({name: row for row, name in enumerate(thresholds, start=len(self.sets))})
        more, self.selected = self._stacked([*thresholds.values()]), None
        for name in self._one._columns:
            columns = [getattr(self._all, name), getattr(more, name)]
            setattr(self._all, name, self._form.concatenate(columns))

    def select(self, names: tuple[str, ...]) -> None:
        """Take the norms of the sets with these names from now on."""
        rows: Any = np.array([self.sets[name] for name in names])
        if np.array_equal(rows, np.arange(len(self.sets))):
            rows = None
        elif self.device is not None:
            rows = torch.from_numpy(rows).to(self.device, non_blocking=True)
        self.selected, self._rows = names, rows

    def update(self, norms: Norms, order: float) -> Norms:
        """Learn from the norms and return the thresholds.

        Args:
            norms: a norm for each of the sets, below 0 where there is no gradient.
            order: their order.

        Returns:
            The thresholds, infinite where there is no gradient.
        """
        form, rows = self._form, self._rows
        columns: Any = norms if self.device is not None else np.array(norms)
        if rows is not None:
            there, columns = columns, form.filled(len(self.sets), ABSENT)
            columns[rows] = there
        with np.errstate(all="ignore"):  # of numbers that are not used in the end
            max_norms = form.where(columns < 0, math.inf, self._all._learn(columns, form, order))
        max_norms = max_norms if rows is None else max_norms[rows]
        found: Norms = max_norms if self.device is not None else max_norms.tolist()
        return found

    @property
    def thresholds(self) -> dict[str, Any]:
        """An object for each row, by the name of its set; waits for the device."""
        columns = {name: getattr(self._all, name).tolist() for name in self._one._columns}
        rows = [copy.deepcopy(self._one) for _ in self.sets]
        for name, values in columns.items():
            for row, value in zip(rows, values, strict=True):
                row._from_row(name, value)
        return dict(zip(self.sets, rows, strict=True))
