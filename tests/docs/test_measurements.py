"""The figures in pictures and tables come from one run: those that ``write_page.py`` has read."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

DOCS = Path(__file__).parents[2] / "docs"
COLUMNS = {
    "function": "clip_grad_norm_(model.parameters(), …)",
    "function, model": "clip_grad_norm_(model, …)",
}
Tables = dict[str, dict[str, dict[str, str]]]
Ratios = dict[str, dict[str, dict[str, float]]]
TABLE = re.compile(r"^\*\*(.+)\*\*\n\n((?:\|.*\n)+)", re.MULTILINE)


@pytest.fixture(scope="module")
def tables() -> Tables:
    """The tables of the page with their titles: row → column → text."""
    found: Tables = {}
    for title, text in TABLE.findall((DOCS / "performance.md").read_text(encoding="utf-8")):
        columns, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
        found[title] = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    return found


@pytest.fixture(scope="module")
def drawn() -> Ratios:
    """The ratios in the picture: panel → contender → row → ratio."""
    with Image.open(DOCS / "figures" / "speed.png") as picture:
        found: Ratios = json.loads(picture.info["Ratios"])
    return found


def ratio(cell: str) -> str:
    """The ratio in brackets behind a time, or that the machine was busy."""
    found: str = re.findall(r"\((.*)\)", cell)[-1]
    return found


def test_the_bars_of_the_picture_have_the_numbers_of_the_tables(tables: Tables, drawn: Ratios) -> None:
    of_steps = {
        name.partition(":")[0]: table
        for name, table in tables.items()
        if name.endswith("µs added to a training step")
    }
    bars = drawn["in a training step"]
    assert len(of_steps) == 2
    for column, label in COLUMNS.items():
        expected = {
            f"{model}, {row}": ratio(cells[column])
            for model, table in of_steps.items()
            for row, cells in table.items()
        }
        shown = {row: f"{number:.1f}×" for row, number in bars[label].items()}
        assert shown == {row: text for row, text in expected.items() if text != "busy"}


def test_the_points_of_the_picture_have_the_numbers_of_the_tables(tables: Tables, drawn: Ratios) -> None:
    of_calls = {
        name.rpartition(": ")[0]: table for name, table in tables.items() if name.endswith(" elements")
    }
    panels = {name: panel for name, panel in drawn.items() if name != "in a training step"}
    assert len(of_calls) == 7
    assert len(panels) == 4
    for operation, panel in panels.items():
        expected = {model: ratio(table[operation]["torchclip"]) for model, table in of_calls.items()}
        shown = {row: f"{number:.1f}×" for row, number in panel["torchclip"].items()}
        assert shown == {row: text for row, text in expected.items() if text != "busy"}


def test_the_readme_has_the_table_of_the_page() -> None:
    pages = [DOCS.parent / "README.md", DOCS / "performance.md"]
    short = [
        re.search(r"\n(\|  \| torch \| torchclip \|.*?)\n\n", page.read_text(encoding="utf-8"), re.DOTALL)
        for page in pages
    ]
    assert short[0]
    assert short[1]
    assert short[0][1] == short[1][1]
