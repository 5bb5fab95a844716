"""A history as a page for a browser: a single file that loads nothing else."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from torchclip.history.figure import histogram_figure, history_figure
from torchclip.history.layers import layers_figure

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

    from torchclip.history.advice import Advice
    from torchclip.history.layers import Array
    from torchclip.history.summary import Summary

# A picture with more points than this is drawn as pixels, as a marker for each would take much space.
_MANY_POINTS = 1000
# Each picture is drawn for two widths of the window, in inches, so that its text always has the page's size.
_WIDTHS = {"wide": 9.5, "narrow": 4.6}


class _Drawing(NamedTuple):
    window: str
    """A key of ``_WIDTHS``."""
    svg: Markup
    left: float
    """The beginning and the end of the axes, as shares of the width, and the values there."""
    right: float
    first: float
    last: float


class _Picture(NamedTuple):
    title: str
    drawings: list[_Drawing]
    caption: str
    points: Markup | None = None
    """The page's data about each step, as JSON."""


class Shown(NamedTuple):
    """What a page shows of a run."""

    columns: Mapping[str, Sequence[Any]]
    """The columns of a history."""
    summary: Summary
    advice: Advice | None
    """None for a run without advice of its own."""
    layers: tuple[list[str], list[int], Array]
    """Names, steps and norms of single parameters."""
    ratios: Array | None = None
    """Their updates divided by their weights; None if these are not known."""


class Overview(NamedTuple):
    """The top of a page about several runs: a table, whose first row is its heading, and a picture."""

    rows: Sequence[Sequence[str]]
    title: str
    draw: Callable[[float], Figure]
    """Draws the picture for a width in inches."""


class _Run(NamedTuple):
    name: str
    numbers: list[tuple[str, str]]
    about: Sequence[str]
    advice: Advice | None
    figures: list[_Picture]


def page(
    title: str,
    shown: Mapping[str, Shown],
    about: Mapping[str, Sequence[str]] | None = None,
    overview: Overview | None = None,
    verdict: str = "",
    remarks: Sequence[str] = (),
) -> str:
    """The HTML of a page about the runs of several optimizers.

    Args:
        title: the heading.
        shown: the runs, by name; the name of a single run is not shown.
        about: further lines, by the name of the run; under the empty name, about all of them.
        overview: shown above the runs.
        verdict: a sentence that comes before all of it.
        remarks: what is worth a look before anything else.
    """
    from jinja2 import Environment, StrictUndefined

    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    said = about or {}
    runs = [_run(name, each, said.get(name, ()) if name else ()) for name, each in shown.items()]
    if len(runs) == 1 and overview is None:
        runs[0] = runs[0]._replace(name="")
    picture = None
    if overview is not None:
        picture = _Picture(overview.title, _drawings("overview", overview.draw), "")
    return environment.from_string(template).render(
        title=title,
        runs=runs,
        about=said.get("", ()),
        rows=overview and overview.rows,
        picture=picture,
        verdict=verdict,
        remarks=remarks,
    )


def _run(name: str, shown: Shown, about: Sequence[str]) -> _Run:
    columns, summary, advice, layers, ratios = shown
    figures = [_norms(name, columns), _histogram(name, columns, advice)] if columns["step"] else []
    if layers[1]:
        drawings = _drawings(f"layers of {name}", lambda width: layers_figure(*layers, width, ratios))
        figures.append(_Picture("Layers", drawings, "Gray: no gradient, or a norm of 0. Red: not finite."))
    return _Run(name, _numbers(summary), about, advice, figures)


def _numbers(summary: Summary) -> list[tuple[str, str]]:
    """The summary as numbers with their labels."""
    numbers = [
        (f"{summary.steps:,}", "steps"),
        (f"{summary.clipped_share:.1%}", f"clipped ({summary.clipped:,})"),
        (f"{summary.nonfinite:,}", "not finite"),
        (f"{summary.skipped:,}", "skipped"),
    ]
    if summary.quantiles:
        numbers.append((f"{summary.quantiles[0.5]:.3g}", "median norm"))
        if summary.clipped_quantiles:
            numbers.append((f"{summary.clipped_quantiles[0.5]:.3g}", "median after clipping"))
        numbers.append((f"{summary.largest_norm:.3g}", f"largest norm, at step {summary.largest_step:,}"))
    return numbers


def _norms(name: str, columns: Mapping[str, Sequence[Any]]) -> _Picture:
    from markupsafe import Markup

    drawings = _drawings(f"norms of {name}", lambda width: _norms_figure(columns, width))
    marks = zip(columns["clipped"], columns["nonfinite"], columns["skipped"], strict=True)
    points = {
        "step": columns["step"],
        "norm": _short(columns["total_norm"]),
        "clipped_norm": _short(columns["clipped_norm"]),
        "max_norm": _short(columns["max_norm"]),
        "loss": _short([math.nan if loss is None else loss for loss in columns["loss"]]),
        "mark": "".join(
            "s" if skipped else "n" if bad else "c" if clipped else "-" for clipped, bad, skipped in marks
        ),
    }
    caption = "Norms before clipping. Point at a step to read it."
    # Only numbers and letters, so that nothing needs to be escaped.
    data = Markup(json.dumps(points, separators=(",", ":")))
    has_loss = any(loss is not None for loss in columns["loss"])
    return _Picture("Norm and loss over steps" if has_loss else "Norm over steps", drawings, caption, data)


def _norms_figure(columns: Mapping[str, Sequence[Any]], width: float) -> Figure:
    figure = history_figure(columns, width)
    for line in [line for axes in figure.axes for line in axes.lines]:
        if len(np.asarray(line.get_xdata())) > _MANY_POINTS:
            if line.get_label() in ("norm", "loss"):
                line.set_marker("")
            elif line.get_linestyle() == "None":
                line.set_rasterized(True)
    return figure


def _short(values: Sequence[float]) -> list[float | str]:
    """Values to four digits, as JSON numbers or strings; a single one if all are equal."""
    shown = [float(f"{value:.4g}") if math.isfinite(value) else f"{value}" for value in values]
    return shown[:1] if len(set(shown)) == 1 else shown


def _histogram(name: str, columns: Mapping[str, Sequence[Any]], advice: Advice | None) -> _Picture:
    norms, max_norms = columns["total_norm"], columns["max_norm"]
    # A threshold to keep is drawn as the threshold of the run.
    suggested = None if advice is None or advice.verdict == "keep" else advice.max_norm
    drawings = _drawings(
        f"histogram of {name}", lambda width: histogram_figure(norms, max_norms, suggested, width)
    )
    return _Picture("Distribution of the norms", drawings, "Norms that are finite and above 0.")


def _drawings(name: str, draw: Callable[[float], Figure]) -> list[_Drawing]:
    """A figure, drawn for each width of the window; ``name`` is unique on the page."""
    drawings = []
    for window, width in _WIDTHS.items():
        figure = draw(width)
        svg = _svg(figure, f"{name}, {window}")
        if figure.axes:
            box, limits = figure.axes[0].get_position(), figure.axes[0].get_xlim()
            drawings.append(_Drawing(window, svg, box.x0, box.x1, *limits))
        else:
            drawings.append(_Drawing(window, svg, 0.0, 1.0, 0.0, 1.0))
    return drawings


def _svg(figure: Figure, salt: str) -> Markup:
    """A figure as SVG with the width and the colors of the page.

    ``salt`` makes the names inside it unique on the page.
    """
    import matplotlib
    from markupsafe import Markup
    from matplotlib.colors import to_rgba

    for legend in [*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))]:
        legend.set_frame_on(False)
    figure.set_facecolor("none")
    for axes in figure.axes:
        if axes.get_facecolor() == to_rgba("white"):
            axes.set_facecolor("none")
        for place in ("left", "center"):
            axes.set_title("", loc=place)  # the page has its own title
        for mesh in axes.collections:
            mesh.set_rasterized(True)
    file = io.StringIO()
    # Text stays text, and the same history gives the same page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(file, format="svg", dpi=72, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    # Groups have the same numbers in every figure, and nothing refers to them.
    svg = re.sub(r'<g id="[A-Za-z0-9.]+_[0-9]+"', "<g", svg)
    return Markup(re.sub(r' (?:width|height)="[^"]*"', "", svg[: (end := svg.index(">"))]) + svg[end:])
