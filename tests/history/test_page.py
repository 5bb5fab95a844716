"""The page that a history is written to: complete, self-contained, small."""

import html
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchclip.history import History
from torchclip.history.figure import losses_figure
from torchclip.history.page import page

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


def history_of(steps: int, layers: int = 0) -> History:
    rng, history = np.random.default_rng(0), History()
    for step, norm in enumerate(rng.lognormal(sigma=0.4, size=steps).tolist()):
        history.append(step, norm, 1.0, min(1.0, 1 / norm))
    names = [f"layers.{i // 10}.part{i % 10}.weight" for i in range(layers)]
    for step in range(0, steps if layers else 0, 20):
        history.layers.append(step, names, rng.lognormal(size=layers).tolist())
    return history


def written(history: History, path: Path, **options: Any) -> str:
    history.to_html(path, **options)
    return path.read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Checks that tags are closed, and collects attributes."""

    VOID = ("meta", "br", "link", "img", "path", "use", "rect", "image")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_it_says_what_the_history_says(tmp_path: Path) -> None:
    history = history_of(200, layers=12)
    history.append(200, math.nan, 1.0, math.nan, skipped=True)
    history.append(201, 40.0, 1.0, 1 / 40)
    page = written(history, tmp_path / "page.html", title="My run")
    assert "<title>My run</title>" in page
    assert "<h1>My run</h1>" in page
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    summary, advice = history.summary(), history.suggest()
    assert f"{summary.steps} steps" in re.sub(r"\s+", " ", text)
    assert f"clipped ({summary.clipped})" in text
    assert advice.reason in text
    assert all(said in text for said in advice.words)
    assert all(f"{max_norm:.3g}" in text for max_norm in advice.table.values())
    assert page.count("<svg") == 3
    assert "layers.0.part0.weight" in page
    assert Tags(page).open == []


@pytest.mark.parametrize("steps", [0, 1, 20, 2000])
def test_it_fetches_nothing(steps: int, tmp_path: Path) -> None:
    page = written(history_of(steps, layers=5), tmp_path / "page.html")
    tags = Tags(page)
    assert tags.open == []
    for tag, name, value in tags.attributes:
        assert tag not in ("link", "iframe", "base")
        if name in ("src", "href", "xlink:href", "action"):
            assert value is not None
            assert value.startswith(("#", "data:")), (tag, name, value)
    assert not re.search(r"url\((?!#|&quot;#)", page)
    assert not re.search(r"@import|fetch\(|XMLHttpRequest|WebSocket", page)


def test_ten_thousand_steps_are_below_two_megabytes(tmp_path: Path) -> None:
    page = written(history_of(10_000, layers=600), tmp_path / "page.html")
    assert len(page.encode()) < 2_000_000


def test_pictures_have_the_width_of_the_page(tmp_path: Path) -> None:
    tags = Tags(written(history_of(100, layers=5), tmp_path / "page.html"))
    sizes = [(name, value) for tag, name, value in tags.attributes if tag == "svg"]
    assert [name for name, _ in sizes if name in ("width", "height")] == []
    assert {value.split()[2] for name, value in sizes if name == "viewbox" and value} == {"684"}


def test_no_two_elements_have_the_same_id() -> None:
    histories = {"actor": history_of(100, layers=5), "critic": history_of(100, layers=5)}
    tags = Tags(page("two", histories))
    ids = [value for _, name, value in tags.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_a_run_without_advice_of_its_own_has_numbers_and_pictures() -> None:
    compared = [["threshold", "loss"], ["one", "0.5"]], losses_figure({"one": [1.0, 0.5]})
    shown = page("tried", {"one": history_of(100)}, compared=compared)
    assert "Advice" not in shown
    assert "suggested" not in shown
    assert "median norm" in shown
    assert "median after clipping" in shown


def test_titles_and_names_of_parameters_are_text(tmp_path: Path) -> None:
    history = history_of(60)
    history.layers.append(0, ["</svg><script>alert(1)</script>"], [1.0])
    page = written(history, tmp_path / "page.html", title="a < b & <script>alert(1)</script> ü")
    assert "<script>alert" not in page
    assert "a &lt; b &amp; &lt;script&gt;alert(1)&lt;/script&gt; ü" in page
    assert Tags(page).open == []


@pytest.mark.parametrize("norm", [0.0, math.nan, math.inf, 1.0])
def test_runs_with_little_to_draw(norm: float, tmp_path: Path) -> None:
    history = History()
    for step in range(60):
        history.append(step, norm, math.inf, 1.0)
    assert "60" in written(history, tmp_path / "page.html")


def test_the_same_history_gives_the_same_page(tmp_path: Path) -> None:
    history = history_of(100, layers=5)
    assert written(history, tmp_path / "a.html") == written(history, tmp_path / "b.html")


def test_colors_follow_the_readers_scheme(tmp_path: Path) -> None:
    page = written(history_of(100), tmp_path / "page.html")
    assert "prefers-color-scheme: dark" in page
    assert "#000000" not in page
    assert "fill: #ffffff" not in page
    assert "currentColor" in page


def test_a_parameter_without_a_gradient_is_gray_in_any_scheme(tmp_path: Path) -> None:
    history = history_of(60)
    history.layers.append(0, ["weight", "bias"], [1.0, -1.0])
    assert written(history, tmp_path / "page.html").count("#d9d9d9") == 1


@pytest.mark.parametrize(
    ("method", "package"),
    [("plot", "matplotlib"), ("plot_layers", "matplotlib"), ("to_html", "matplotlib"), ("to_html", "jinja2")],
)
def test_without_what_it_needs_it_says_what_to_install(
    method: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{method}\(\) needs {package}.*torchclip\[demo\]"):
        getattr(History(), method)(tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
