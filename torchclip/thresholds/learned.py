"""What this package's thresholds have in common: a state, a formula, and columns of what they learn."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from torchclip._core import arguments, scalars
from torchclip._core.batch import Norms
from torchclip._core.scalars import ABSENT
from torchclip.thresholds import checks
from torchclip.thresholds.forms import FLOATS, Tensors

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

    It keeps what it has learned in attributes, the columns, whose values never change in place.  In an object
    that a user makes, each column is a number.  In ``Rows``, each column is a tensor with an entry for each
    set, and the same formula updates all entries.
    """

    _columns: ClassVar[tuple[str, ...]]
    """The attributes that hold what was learned."""

    def update(self, norm: float) -> float:
        """Learn from ``norm`` and return the threshold of this step."""
        if type(norm) is not float or norm < 0:
            norm = checks.norm(norm)
        max_norm: float = self._learn(norm, FLOATS)
        return max_norm

    @abstractmethod
    def _learn(self, norms: Any, form: Any, order: float = 2.0) -> Any:
        """Learn from norms and return the thresholds.

        Args:
            norms: a norm, or a tensor with one for each set; negative where there is no gradient.  Nothing is
                learned from negative norms, ``inf`` and ``nan``.
            form: the functions for this kind of number.
            order: the order of the norms, for rules that join them.
        """

    def _copied(self: Kind) -> Kind:
        """A copy for a saved state."""
        copied = object.__new__(type(self))  # copy.copy() takes several times as long
        vars(copied).update(vars(self))  # no column changes in place
        return copied

    def _to_row(self, name: str) -> Any:
        """The row for what was learned."""
        return getattr(self, name)

    def _from_row(self, name: str, value: Any) -> None:
        """Take what was learned from a row."""
        setattr(self, name, value)

    def _takes_rows(self, on_device: bool) -> bool:
        """Whether many sets can learn together: in host memory, or on a device without waiting for it."""
        return True


def has_own_update(threshold: Learned) -> bool:
    """Whether a user's subclass has its own ``update``, which must be called for each norm."""
    return not type(threshold).update.__module__.startswith("torchclip.")


class Objects:
    """Thresholds of a few sets, or of a user's own kind: an object for each.

    Attributes:
        thresholds: the objects, by the names of their sets.
    """

    device = None

    def __init__(self, thresholds: dict[str, Any]) -> None:
        self.thresholds = thresholds

    @property
    def names(self) -> Collection[str]:
        """The names of the sets."""
        return self.thresholds

    def copied(self) -> Objects:
        """Copies for a saved state."""
        copies = {}
        for name, threshold in self.thresholds.items():
            is_ours = isinstance(threshold, Learned)
            copies[name] = threshold._copied() if is_ours else copy.deepcopy(threshold)
        return Objects(copies)

    def add(self, thresholds: Mapping[str, Any]) -> None:
        """Add sets after the existing ones."""
        self.thresholds.update(thresholds)

    def update(self, names: Sequence[str], norms: Norms, order: float) -> list[float]:
        """Learn from the norms of some sets, negative without a gradient, and return their thresholds."""
        # A norm of -inf is not finite, but it is there.
        return [
            math.inf if -math.inf < norm < 0 else self.thresholds[name].update(norm)
            for name, norm in zip(names, scalars.numbers(norms), strict=True)
        ]


class Rows:
    """Thresholds of many sets, or of sets on a device, which learn together: a row for each in every column.

    Args:
        thresholds: the objects to start from, of the same kind with the same arguments, by the names of the
            sets.
        device: where they learn.

    Attributes:
        names: the number of the row by the name of each set.
    """

    def __init__(self, thresholds: Mapping[str, Any], device: torch.device) -> None:
        self._form = Tensors(device)
        self._one = next(iter(thresholds.values()))
        self._all = self._stacked([*thresholds.values()])
        self.names = {name: row for row, name in enumerate(thresholds)}
        # The sets that learned last, and their rows, or None if these are all rows in order.
        self._latest: tuple[list[str], Tensor | None] = [*thresholds], None

    @property
    def device(self) -> torch.device:
        """Where they learn."""
        return self._form.device

    def _stacked(self, thresholds: Sequence[Learned]) -> Any:
        stacked = copy.copy(self._one)
        for name in self._one._columns:
            setattr(stacked, name, self._form.column([each._to_row(name) for each in thresholds]))
        return stacked

    def copied(self) -> Rows:
        """A copy for a saved state."""
        copied = copy.copy(self)
        copied._all, copied.names = copy.copy(self._all), dict(self.names)  # no tensor changes in place
        return copied

    def add(self, thresholds: Mapping[str, Learned]) -> None:
        """Add rows after the existing ones."""
        self.names.update({name: row for row, name in enumerate(thresholds, start=len(self.names))})
        more = self._stacked([*thresholds.values()])
        self._latest = [], None
        for name in self._one._columns:
            setattr(self._all, name, torch.cat([getattr(self._all, name), getattr(more, name)]))

    def update(self, names: Sequence[str], norms: Norms, order: float) -> Norms:
        """Learn from the norms of some sets and return their thresholds.

        Args:
            names: the names of the sets.
            norms: a norm for each of them, below 0 where there is no gradient.
            order: the order of the norms.

        Returns:
            The thresholds, infinite where there is no gradient; a list if the norms are a list.
        """
        form, rows = self._form, self._rows_of(names)
        learned = of_all = form.norms(norms)
        if rows is not None:
            of_all = form.filled(len(self.names), ABSENT).index_copy(0, rows, learned)
        max_norms = self._all._learn(of_all, form, order).masked_fill(of_all < 0.0, math.inf)
        if rows is not None:
            max_norms = max_norms[rows]
        found: Norms = max_norms.tolist() if isinstance(norms, list) else max_norms
        return found

    def _rows_of(self, names: Sequence[str]) -> Tensor | None:
        if names != self._latest[0]:
            rows = [self.names[name] for name in names]
            in_order = rows == [*range(len(self.names))]
            self._latest = [*names], None if in_order else self._form.column(rows)
        return self._latest[1]

    @property
    def thresholds(self) -> dict[str, Any]:
        """An object for each row, by the name of its set; waits for the device."""
        columns = {name: getattr(self._all, name).tolist() for name in self._one._columns}
        rows = [copy.deepcopy(self._one) for _ in self.names]
        for name, values in columns.items():
            for row, value in zip(rows, values, strict=True):
                row._from_row(name, value)
        return dict(zip(self.names, rows, strict=True))
