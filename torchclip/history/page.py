"""A history as a page for a browser: a single file that loads nothing else."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from torchclip.history.figure import histogram_figure, history_figure
from torchclip.history.heat_map import heat_maps

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

    from torchclip.history.advice import Advice
    from torchclip.history.history import History
    from torchclip.history.summary import Summary

# With more points than this, markers are drawn as pixels, as each would take much space.
_MANY_POINTS = 1000
_WIDTH = 9.5  # inches, with which text in pictures has the size of the page's text


class _Picture(NamedTuple):
    title: str
    svg: Markup
    caption: str = ""


def page(
    title: str,
    histories: Mapping[str, History],
    about: Mapping[str, Sequence[str]] | None = None,
    compared: tuple[Sequence[Sequence[str]], Figure] | None = None,
    verdict: str = "",
    remarks: Sequence[str] = (),
) -> str:
    """The HTML of a page about the runs of several optimizers.

    Args:
        title: the heading.
        histories: the runs, by name; the name of a single run is not shown.
        about: further lines, by the name of the run; under the empty name, about all of them.
        compared: what compares the runs, which then have no advice of their own: a table, whose first row is
            its heading, and a picture of their losses.
        verdict: a sentence that comes before all of it.
        remarks: what is worth a look before anything else.
    """
    from jinja2 import Environment, StrictUndefined

    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    said = about or {}
    rows, losses = compared or ((), None)
    has_names = len(histories) > 1 or compared is not None
    runs = []
    for name, history in histories.items():
        advice = None if compared is not None else history.suggest()
        runs.append(
            {
                "name": name if has_names else "",
                "numbers": _numbers(history.summary()),
                "about": said.get(name, ()) if name else (),
                "advice": advice,
                "pictures": _pictures(name, history, advice),
            }
        )
    return environment.from_string(template).render(
        title=title,
        runs=runs,
        about=said.get("", ()),
        rows=rows,
        picture=losses and _Picture("Loss of each run", _svg(losses, "overview")),
        verdict=verdict,
        remarks=remarks,
    )


def _pictures(name: str, history: History, advice: Advice | None) -> list[_Picture]:
    columns, layers = history.as_dict(), history.layers._pictured()
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
