"""A history as a page for a browser: a single file that loads nothing else."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from torchclip.history.figure import histogram_figure, history_figure
from torchclip.history.heat_map import heat_maps

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

    from torchclip.history.advice import Advice
    from torchclip.history.layers import Array
    from torchclip.history.summary import Summary

# With more points than this, markers are drawn as pixels, as each would take much space.
_MANY_POINTS = 1000
_WIDTH = 9.5  # inches, with which text in pictures has the size of the page's text


class Shown(NamedTuple):
    """What a page shows of a run."""

    columns: Mapping[str, Sequence[Any]]
    """The columns of a history."""
    summary: Summary
    advice: Advice | None
    """None for a run without advice of its own."""
    layers: tuple[list[str], list[int], Array, Array | None]
    """What ``heat_maps`` draws."""


class Overview(NamedTuple):
    """The top of a page about several runs: a table, whose first row is its heading, and a picture."""

    rows: Sequence[Sequence[str]]
    title: str
    figure: Figure


class _Picture(NamedTuple):
    title: str
    svg: Markup
    caption: str = ""


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
    has_names = len(shown) > 1 or overview is not None
    runs = [
        {
            "name": name if has_names else "",
            "numbers": _numbers(each.summary),
            "about": said.get(name, ()) if name else (),
            "advice": each.advice,
            "pictures": _pictures(name, each),
        }
        for name, each in shown.items()
    ]
    return environment.from_string(template).render(
        title=title,
        runs=runs,
        about=said.get("", ()),
        rows=overview and overview.rows,
        picture=overview and _Picture(overview.title, _svg(overview.figure, "overview")),
        verdict=verdict,
        remarks=remarks,
    )


def _pictures(name: str, shown: Shown) -> list[_Picture]:
    columns, _, advice, layers = shown
    pictures = []
    if columns["step"]:
        has_loss = any(loss is not None for loss in columns["loss"])
        title = "Norm and loss over steps" if has_loss else "Norm over steps"
        svg = _svg(history_figure({title: columns}), f"norms of {name}")
        pictures.append(_Picture(title, svg, "Norms before clipping."))
        # A threshold to keep is drawn as the threshold of the run.
        suggested = None if advice is None or advice.verdict == "keep" else advice.max_norm
        figure = histogram_figure(columns["total_norm"], columns["max_norm"], suggested)
        svg = _svg(figure, f"histogram of {name}")
        pictures.append(_Picture("Distribution of the norms", svg, "Norms that are finite and above 0."))
    if layers[1]:
        svg = _svg(heat_maps(*layers), f"layers of {name}")
        pictures.append(_Picture("Layers", svg, "Gray: no gradient, or a norm of 0. Red: not finite."))
    return pictures


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


def _svg(figure: Figure, salt: str) -> Markup:
    """A figure as SVG with the width and the colors of the page.

    ``salt`` makes the names inside it unique on the page.
    """
    import matplotlib
    from markupsafe import Markup
    from matplotlib.colors import to_rgba

    figure.set_figwidth(_WIDTH)
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
        for line in axes.lines:
            if len(np.asarray(line.get_xdata())) > _MANY_POINTS:
                if line.get_linestyle() == "None":
                    line.set_rasterized(True)
                else:
                    line.set_marker("")
    file = io.StringIO()
    # Text stays text, and the same history gives the same page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(file, format="svg", dpi=72, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    # Groups have the same numbers in every figure, and nothing refers to them.
    svg = re.sub(r'<g id="[A-Za-z0-9.]+_[0-9]+"', "<g", svg)
    return Markup(re.sub(r' (?:width|height)="[^"]*"', "", svg[: (end := svg.index(">"))]) + svg[end:])
