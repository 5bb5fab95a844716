"""The norm of every parameter in some of the steps: which layer explodes, when, and how far steps move it."""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torchclip._core import arguments
from torchclip.history.records import integer, numbers
from torchclip.history.updates import Update

Array = NDArray[Any]
Norms = Tensor | list[float]

_ABSENT = -1.0
"""In place of a norm that was not recorded."""


class _Row(NamedTuple):
    """One step: its gradients' norms, then for each optimizer the norms of weights and of their updates."""

    step: int
    names: tuple[Sequence[str], ...]
    """Of the parameters; then of those of each optimizer."""
    norms: Sequence[Norms]
    """Of the gradients; then two for each optimizer."""


class Layers:
    """The norm of every parameter's gradient before clipping, in some of the steps.

    ``Clipper.history.layers``, of a ``Clipper`` with ``layers_every``.  At most ``maxlen`` steps are kept.
    When there are more, every other one is dropped, and from then on only every other one is recorded.  So
    the kept steps always cover the whole run, more and more coarsely.

    Args:
        maxlen: the largest number of steps to keep, at least 2.

    Examples:
        >>> layers = Layers()
        >>> layers.append(0, ["body.weight", "head.weight"], [1.0, 2.0])
        >>> layers.append(10, ["body.weight", "head.weight"], [3.0, 4.0])
        >>> layers.names, layers.steps
        (['body.weight', 'head.weight'], [0, 10])
        >>> layers.norms
        array([[1., 2.],
               [3., 4.]])
    """

    def __init__(self, maxlen: int = 500) -> None:
        self._maxlen = arguments.count("maxlen", maxlen, least=2)
        # Other threads may read: rows are replaced, never changed, and the list only grows.
        self._rows: list[_Row] = []
        self._every, self._offered = 1, 0
        self._in_model_order = False  # known to be; then the advice says where a backward pass broke

    def append(
        self,
        step: int,
        names: Sequence[str],
        norms: Sequence[float] | Tensor,
        updates: Sequence[tuple[Sequence[str], Norms, Norms]] = (),
    ) -> None:
        """Record the norms of a step, without waiting for any value.

        Args:
            step: the step's number.
            names: the names of the parameters, in the order of the model.
            norms: their norms before clipping; a tensor must not be modified afterwards. Negative for
                parameters without a gradient.
            updates: how far the step moved parameters: their names, the norms of the weights before it, and
                the norms of what it added to them; for each optimizer.
        """
        number = self._offered
        self._offered += 1
        if number % self._every:
            return
        held = norms if isinstance(norms, Tensor) else list(norms)
        last = self._rows[-1].names[0] if self._rows else ()
        called = last if last == tuple(names) else tuple(names)
        moved_norms = itertools.chain.from_iterable(each[1:] for each in updates)
        self._rows.append(_Row(step, (called, *(each[0] for each in updates)), [held, *moved_norms]))
        if len(self._rows) > self._maxlen:
            self._rows = self._rows[::2]
            self._every *= 2

    def _fetched(self) -> list[_Row]:
        """The rows at this moment, with numbers for tensors."""
        rows = self._rows
        found = rows[:]
        fetched = iter(numbers(norms for row in found for norms in row.norms))
        rows[: len(found)] = found = [
            row._replace(norms=list(itertools.islice(fetched, len(row.norms)))) for row in found
        ]
        return found

    def __getstate__(self) -> dict[str, Any]:
        # A pickle with an accelerator's tensors could not be read on a machine without one.
        return {**vars(self), "_rows": self._fetched()}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def names(self) -> list[str]:
        """The names of the parameters, in the order of the model."""
        return _names(self._rows[:])

    @property
    def steps(self) -> list[int]:
        """The numbers of the kept steps."""
        return [row.step for row in self._rows[:]]

    @property
    def norms(self) -> Array:
        """The norms, of shape ``(steps, parameters)``; 0 for a parameter without a gradient."""
        return self.read()[2]

    @property
    def updates(self) -> dict[str, list[Update]]:
        """How far the kept steps moved each parameter, by its name; of a ``Clipper`` with ``updates=True``.

        Steps that were skipped have none.
        """
        names, steps, (_, weights, changes) = self._read()
        ratios, has_update = _ratios(weights, changes), ~(changes < 0)
        found = {}
        for i, name in enumerate(names):
            at = np.flatnonzero(has_update[:, i])
            columns = (array[at, i].tolist() for array in (weights, changes, ratios))
            if len(at):
                found[name] = list(map(Update, [steps[row] for row in at], *columns))
        return found

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the norms and updates to a file, one line for each step and parameter.

        ``norm`` is that of the gradient; the last three columns are empty where no update was recorded.
        """
        names, steps, norms = self.read()
        updates = {(name, update.step): update for name, all_ in self.updates.items() for update in all_}
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "name", "norm", *Update._fields[1:]])
            for step, of_step in zip(steps, norms.tolist(), strict=True):
                for name, norm in zip(names, of_step, strict=True):
                    update = updates.get((name, step))
                    writer.writerow([step, name, norm, *(("", "", "") if update is None else update[1:])])

    def read(self) -> tuple[list[str], list[int], Array]:
        """Names, steps and norms at the same moment, for a thread that reads while another appends."""
        names, steps, (norms, _, _) = self._read()
        # Without a gradient the norm is 0; NaN stays NaN.
        return names, steps, np.where(norms < 0, 0.0, norms)

    def _read(self) -> tuple[list[str], list[int], Array]:
        """Names, steps, and an array of the norms of gradients, weights and updates."""
        rows = self._fetched()
        names = _names(rows)
        columns = {name: i for i, name in enumerate(names)}
        found = np.full((3, len(rows), len(names)), _ABSENT)
        for i, row in enumerate(rows):
            of_gradients, *of_optimizers = ([columns[name] for name in each] for each in row.names)
            found[0, i, of_gradients] = row.norms[0]
            for place, at in enumerate(of_optimizers):
                found[1:, i, at] = row.norms[1 + 2 * place : 3 + 2 * place]
        return names, [row.step for row in rows], found

    def _pictured(self) -> tuple[list[str], list[int], Array, Array | None]:
        """Names, steps, norms, and updates divided by weights: what ``heat_maps`` draws."""
        names, steps, (norms, weights, changes) = self._read()
        ratios = None if (changes < 0).all() else np.where(changes < 0, 0.0, _ratios(weights, changes))
        return names, steps, np.where(norms < 0, 0.0, norms), ratios

    def state_dict(self) -> dict[str, Any]:
        """All contents, as plain data."""
        names, steps, (norms, weights, updates) = self._read()
        has_updates = not (updates < 0).all()
        return {
            "names": names,
            "steps": steps,
            "norms": norms.tolist(),
            "weights": weights.tolist() if has_updates else None,
            "updates": updates.tolist() if has_updates else None,
            "in_model_order": self._in_model_order,
            "every": self._every,
            "offered": self._offered,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the contents by those of a ``state_dict``.

        Raises:
            TypeError: if ``state`` or a part of it is of a wrong type.
            ValueError: if ``state`` is not that of a history's layers.
        """
        arguments.saved("state['layers']", state, Layers().state_dict(), "History")
        names = tuple(arguments.items("state['layers']['names']", state["names"], arguments.string))
        steps = arguments.items("state['layers']['steps']", state["steps"], integer)
        every = arguments.count("state['layers']['every']", state["every"], least=1)
        offered = arguments.count("state['layers']['offered']", state["offered"], least=0)
        in_model_order = arguments.flag("state['layers']['in_model_order']", state["in_model_order"])
        parts = ["norms"] if state["updates"] is None else ["norms", "weights", "updates"]
        arrays = [_saved_norms(part, state[part], len(steps), len(names)) for part in parts]
        called = (names,) if len(parts) == 1 else (names, names)
        rows = [_Row(step, called, norms) for step, *norms in zip(steps, *arrays, strict=True)]
        while len(rows) > self._maxlen:
            rows, every = rows[::2], every * 2
        self._rows, self._every, self._offered = rows, every, offered
        self._in_model_order = in_model_order


def _names(rows: Sequence[_Row]) -> list[str]:
    distinct = dict.fromkeys(row.names[0] for row in rows)
    return list(dict.fromkeys(itertools.chain.from_iterable(distinct)))


def _ratios(weights: Array, updates: Array) -> Array:
    """Updates divided by weights; ``inf`` for a change of a parameter that was 0, and 0 without a change."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(updates == 0, 0.0, updates / weights)


def _saved_norms(part: str, value: Any, steps: int, names: int) -> list[list[float]]:
    """One of the arrays of a saved state, or an error that names what is wrong."""
    name = f"state['layers']['{part}']"
    rows = arguments.items(name, value, _numbers)
    if len(rows) != steps or any(len(row) != names for row in rows):
        raise ValueError(
            f"`{name}` must have a row for each of the steps, and in it one norm for each of the names"
        )
    return rows


def _numbers(name: str, value: Any) -> list[float]:
    return arguments.items(name, value, arguments.number)
