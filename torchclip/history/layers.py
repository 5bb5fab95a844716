"""The norm of every parameter in some of the steps: which layer explodes, and when."""

from __future__ import annotations

import csv
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torchclip._core import arguments
from torchclip.history.figure import NARROW, label_plainly
from torchclip.history.records import integer, numbers
from torchclip.history.updates import Update, UpdateRow, by_name, kept, loaded, ratios, saved

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[Any]


class _Row(NamedTuple):
    step: int
    names: tuple[str, ...]
    norms: Tensor | list[float]


class Layers:
    """The norm of every parameter's gradient before clipping, in some of the steps.

    At most ``maxlen`` steps are kept.  When there are more, every other one is dropped, and from then on only
    every other one is recorded.  So the kept steps always cover the whole run, more and more coarsely.

    Args:
        maxlen: the largest number of steps to keep, at least 2.

    Attributes:
        in_model_order: whether the names are known to be in the order of the model.

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
        self._updates: list[UpdateRow] = []
        self._every, self._offered = 1, 0
        self.in_model_order = False

    def append(
        self,
        step: int,
        names: Sequence[str],
        norms: Sequence[float] | Tensor,
        updates: Sequence[tuple[Sequence[str], list[float] | Tensor, list[float] | Tensor]] = (),
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
        last = self._rows[-1].names if self._rows else ()
        called = last if last == tuple(names) else tuple(names)
        self._updates += [UpdateRow(step, *each) for each in updates]
        self._rows.append(_Row(step, called, held))
        if len(self._rows) > self._maxlen:
            self._rows = self._rows[::2]
            self._updates = kept(self._updates, {row.step for row in self._rows})
            self._every *= 2

    def _fetched(self) -> list[_Row]:
        """The rows at this moment, with numbers for tensors."""
        rows = self._rows
        found = rows[:]
        norms = numbers(row.norms for row in found)
        rows[: len(found)] = found = [
            row._replace(norms=of_row) for row, of_row in zip(found, norms, strict=True)
        ]
        return found

    def __getstate__(self) -> dict[str, Any]:
        # A pickle with an accelerator's tensors could not be read on a machine without one.
        updates = [UpdateRow(*values) for values in saved(self._updates[:])]
        return {**vars(self), "_rows": self._fetched(), "_updates": updates}

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
        return by_name(self._updates[:])

    def ratios(self, names: Sequence[str], steps: Sequence[int]) -> Array | None:
        """The updates divided by the weights, of shape ``(steps, parameters)``; None if none was recorded."""
        updates = self.updates
        return ratios(updates, names, steps) if updates else None

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
        rows = self._fetched()
        names = _names(rows)
        columns = {name: i for i, name in enumerate(names)}
        norms = np.zeros((len(rows), len(names)))
        for row, values in zip(rows, norms, strict=True):
            values[[columns[name] for name in row.names]] = row.norms
        # Without a gradient the norm is 0; NaN stays NaN.
        return names, [row.step for row in rows], np.where(norms < 0, 0.0, norms)

    def state_dict(self) -> dict[str, Any]:
        """All contents, as plain data."""
        names, steps, norms = self.read()
        return {
            "names": names,
            "steps": steps,
            "norms": norms.tolist(),
            "updates": saved(self._updates[:]),
            "in_model_order": self.in_model_order,
            "every": self._every,
            "offered": self._offered,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the contents by those of a ``state_dict``.

        Raises:
            TypeError: if ``state`` or a part of it is of a wrong type.
            ValueError: if ``state`` is not that of a history's layers.
        """
        arguments.saved("state['layers']", state, ("names", "steps", "norms", "every", "offered"), "History")
        names = tuple(arguments.items("state['layers']['names']", state["names"], arguments.string))
        steps = arguments.items("state['layers']['steps']", state["steps"], integer)
        every = arguments.count("state['layers']['every']", state["every"], least=1)
        offered = arguments.count("state['layers']['offered']", state["offered"], least=0)
        rows = arguments.items("state['layers']['norms']", state["norms"], _numbers)
        if len(rows) != len(steps) or any(len(row) != len(names) for row in rows):
            raise ValueError(
                "`state['layers']['norms']` must have a row for each of the steps, and in it one norm for "
                "each of the names"
            )
        updates = loaded(state.get("updates", ()))  # earlier versions did not save them
        in_model_order = arguments.flag(
            "state['layers']['in_model_order']", state.get("in_model_order", False)
        )
        found = [_Row(step, names, row) for step, row in zip(steps, rows, strict=True)]
        while len(found) > self._maxlen:
            found, every = found[::2], every * 2
        self._rows, self._every, self._offered = found, every, offered
        self._updates = kept(updates, {row.step for row in found})
        self.in_model_order = in_model_order


def _names(rows: Sequence[_Row]) -> list[str]:
    distinct = dict.fromkeys(row.names for row in rows)
    return list(dict.fromkeys(itertools.chain.from_iterable(distinct)))


def _numbers(name: str, value: Any) -> list[float]:
    return arguments.items(name, value, arguments.number)


# The figure

# The number of labels that can be read next to each other.
_MOST_LABELS = 45


def layers_figure(
    names: Sequence[str],
    steps: Sequence[int],
    norms: Array,
    width: float = 9.0,
    ratios: Array | None = None,
) -> Figure:
    """A heat map: parameters from top to bottom in the order of the model, steps from left to right.

    Args:
        names: the names of the parameters.
        steps: the numbers of the steps.
        norms: the norms, of shape ``(steps, parameters)``. Values that a log scale cannot show are gray (0)
            or red (not finite).
        width: of the figure, in inches.
        ratios: the updates divided by the weights, of the same shape, for a second heat map below; None for
            none.
    """
    from matplotlib.figure import Figure

    height = min(max(0.2 * len(names) + 1.5, 3.5), 2 + width)
    maps = [("Norm of each parameter's gradient before clipping", "norm", norms)]
    if ratios is not None:
        maps.append(("Update of each parameter, divided by its norm", "update / weight", ratios))
    figure = Figure(figsize=(width, height * len(maps)), dpi=120, layout="constrained")
    for i, (title, label, values) in enumerate(maps):
        axes = figure.add_subplot(len(maps), 1, i + 1, xlabel="step")
        axes.set_title(title, fontsize=13, loc="left")
        _heat_map(axes, names, steps, values, width, label)
    return figure


def _heat_map(
    axes: Axes, names: Sequence[str], steps: Sequence[int], norms: Array, width: float, label: str
) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    blocks = [_block(name) for name in names]
    label_blocks = len(names) > _MOST_LABELS
    shown = norms[np.isfinite(norms) & (norms > 0)]
    if not len(shown):
        axes.text(0.5, 0.5, "no norms to show", ha="center", va="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    axes.xaxis.set_major_locator(MaxNLocator(5 if width < NARROW else 10, integer=True))
    edges = _edges(steps)
    rows = np.arange(len(names) + 1) - 0.5
    low, high = shown.min(), shown.max()
    scale = LogNorm(low, high if high > low else 1.1 * low)
    axes.set_facecolor("#d9d9d9")  # where there is nothing to draw
    cells = np.ma.masked_where(~(norms > 0) | np.isinf(norms), norms).T
    # As many colors as an eye can distinguish: stored as pixels they take less space than 256.
    mesh = axes.pcolormesh(edges, rows, cells, norm=scale, cmap=colormaps["viridis"].resampled(64))
    side = "bottom" if width < NARROW else "right"
    bar = axes.figure.colorbar(mesh, ax=axes, label=label, location=side, pad=0.02, fraction=0.05, aspect=30)
    label_plainly(bar.ax.xaxis if side == "bottom" else bar.ax.yaxis, few=side == "bottom")
    _mark_nonfinite(axes, steps, norms, edges, rows)
    axes.set_ylim(len(names) - 0.5, -0.5)
    room = 20 if width < NARROW else 40
    labels = [_shortened(name, room) for name in (blocks if label_blocks else names)]
    _label(axes, labels, blocks, label_blocks)


def _mark_nonfinite(axes: Axes, steps: Sequence[int], norms: Array, edges: Array, rows: Array) -> None:
    nonfinite = ~np.isfinite(norms)
    if not nonfinite.any():
        return
    from matplotlib.colors import ListedColormap

    cells = np.ma.masked_where(~nonfinite, nonfinite).T
    axes.pcolormesh(edges, rows, cells, cmap=ListedColormap(["#e41a1c"]))
    at = np.asarray(steps)[nonfinite.any(axis=1)]
    axes.plot(
        at,
        np.full(len(at), 1.0),
        "v",
        color="#e41a1c",
        markersize=6,
        clip_on=False,
        transform=axes.get_xaxis_transform(),
        label=f"not finite ({len(at):,} of {len(steps):,} steps)",
    )
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=9, borderaxespad=0.1)


def _label(axes: Axes, labels: Sequence[str], blocks: Sequence[str], by_block: bool) -> None:
    """Label the rows, or blocks of rows at their middles, and draw lines between blocks."""
    starts = [i for i in range(len(blocks)) if i == 0 or blocks[i] != blocks[i - 1]]
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="white", linewidth=1.0 if not by_block else 0.6)
    if by_block:
        ends = [*starts[1:], len(blocks)]
        skip = -(-len(starts) // _MOST_LABELS)
        chosen = list(zip(starts, ends, strict=True))[::skip]
        axes.set_yticks(
            [(start + end - 1) / 2 for start, end in chosen], [labels[start] for start, _ in chosen]
        )
    else:
        axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", labelsize=8, length=2)


def _shortened(name: str, room: int) -> str:
    """A long name without its middle, as names differ at their ends."""
    start = room // 3
    return name if len(name) <= room else f"{name[:start].rstrip('.')}…{name[start + 1 - room :].lstrip('.')}"


def _block(name: str) -> str:
    """The block of layers that a parameter is in: ``body.layers.3.linear.weight`` → ``body.layers.3``."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    if len(parts) > 1:
        return ".".join(parts[:-1])
    return re.sub(r"(\['params'\])?\[\d+\]$", "", name) or name


def _edges(steps: Sequence[int]) -> Array:
    """The boundaries between the columns of steps."""
    at = np.asarray(steps, dtype=np.float64)
    if len(at) == 1:
        return np.array([at[0] - 0.5, at[0] + 0.5])
    middles = (at[1:] + at[:-1]) / 2
    edges: Array = np.concatenate(
        [[at[0] - (middles[0] - at[0])], middles, [at[-1] + (at[-1] - middles[-1])]]
    )
    return edges
