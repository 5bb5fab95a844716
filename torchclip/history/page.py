"""A history as one page for a browser: a single file that fetches nothing."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from torchclip.history.figure import histogram_figure, history_figure
from torchclip.history.layers import layers_figure

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

    from torchclip.history.advice import Advice
    from torchclip.history.history import History
    from torchclip.history.summary import Summary

__all__ = ["page"]

# A picture with more points than this is drawn as pixels, where a marker for each would be large.
_MANY_POINTS = 1000


class _Picture(NamedTuple):
    title: str
    svg: Markup
    caption: str
    points: Markup | None = None
    """What the page says about each step, as JSON."""


class _Run(NamedTuple):
    name: str
    numbers: list[tuple[str, str]]
    advice: Advice
    table: list[tuple[str, str]]
    figures: list[_Picture]


def page(title: str, histories: Mapping[str, History]) -> str:
    """The HTML of a page about the runs of several optimizers.

    Args:
        title: the heading.
        histories: the runs by what to call them; for a single one the name may be empty.
    """
    from jinja2 import Environment, StrictUndefined

    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    runs = [_run(name, history) for name, history in histories.items()]
    return environment.from_string(template).render(title=title, runs=runs)


def _run(name: str, history: History) -> _Run:
    columns, advice = history.as_dict(), history.suggest()
    figures = [_norms(columns), _histogram(columns, advice)]
    names, steps, norms = history.layers.read()
    if steps:
        caption = "Grey: no gradient, or a norm of 0. Red: not finite."
        figures.append(_Picture("Layers", _svg(layers_figure(names, steps, norms)), caption))
    table = [(f"{share:.1%}", f"{max_norm:.3g}") for share, max_norm in advice.table.items()]
    return _Run(name, _numbers(history.summary()), advice, table, figures)


def _numbers(summary: Summary) -> list[tuple[str, str]]:
    """The summary as numbers and what they count."""
    numbers = [
        (f"{summary.steps:,}", "steps"),
        (f"{summary.clipped_share:.1%}", f"clipped ({summary.clipped:,})"),
        (f"{summary.nonfinite:,}", "not finite"),
        (f"{summary.skipped:,}", "skipped"),
    ]
    if summary.quantiles:
        numbers.append((f"{summary.quantiles[0.5]:.3g}", "median norm"))
        numbers.append((f"{summary.largest_norm:.3g}", f"largest norm, at step {summary.largest_step:,}"))
    return numbers


def _norms(columns: Mapping[str, Sequence[Any]]) -> _Picture:
    from markupsafe import Markup

    figure = history_figure(columns)
    (axes,) = figure.axes
    for line in axes.lines:
        if len(np.asarray(line.get_xdata())) > _MANY_POINTS:
            if line.get_label() == "norm":
                line.set_marker("")
            elif line.get_linestyle() == "None":
                line.set_rasterized(True)
    svg = _svg(figure)
    box, (first, last) = axes.get_position(), axes.get_xlim()
    marks = zip(columns["clipped"], columns["nonfinite"], columns["skipped"], strict=True)
    points = {
        "left": box.x0,
        "right": box.x1,
        "first": first,
        "last": last,
        "step": columns["step"],
        "norm": _short(columns["total_norm"]),
        "max_norm": _short(columns["max_norm"]),
        "mark": "".join(
            "s" if skipped else "n" if bad else "c" if clipped else "-" for clipped, bad, skipped in marks
        ),
    }
    caption = "Before clipping. Point at a step to read it."
    # Numbers and letters only, so that no character needs to be escaped.
    data = Markup(json.dumps(points, separators=(",", ":"))) if columns["step"] else None
    return _Picture("Norm over steps", svg, caption, data)


def _short(values: Sequence[float]) -> list[float | str]:
    """Values to four digits, for which JSON has numbers or must take strings; one if all are the same."""
    shown = [float(f"{value:.4g}") if math.isfinite(value) else f"{value}" for value in values]
    return shown[:1] if len(set(shown)) == 1 else shown


def _histogram(columns: Mapping[str, Sequence[Any]], advice: Advice) -> _Picture:
    figure = histogram_figure(columns["total_norm"], columns["max_norm"], advice.max_norm)
    return _Picture("How often which norm", _svg(figure), "Norms that are finite and above 0.")


def _svg(figure: Figure) -> Markup:
    """A figure as SVG that takes the width and the colours of the page."""
    import matplotlib
    from markupsafe import Markup

    for legend in [*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))]:
        legend.set_frame_on(False)
    for axes in figure.axes:
        for place in ("left", "center"):
            axes.set_title("", loc=place)  # the page has one above
        for mesh in axes.collections:
            mesh.set_rasterized(True)
    file = io.StringIO()
    # Text stays text; the same history gives the same page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "torchclip"}):
        figure.savefig(file, format="svg", dpi=72, transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    return Markup(
        re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg))
    )
