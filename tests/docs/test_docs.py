"""The code of the documentation runs by Sybil (see documentation.py); all other blocks say what they are."""

import logging
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
INCLUDE = "{.python}"  # an included file; ruff would reformat the mark of one in a block of "python"


def test_every_block_says_what_it_is() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    languages = [re.findall(r"^```(.*)\n(?:.*\n)*?```$", text, re.MULTILINE) for text in texts]
    found = {language.strip() for of_page in languages for language in of_page}
    assert {"python", "pycon"} <= found <= {"python", "pycon", "console", "text", INCLUDE}


def test_the_first_pages_are_short() -> None:
    for name, most in (("README.md", 110), ("CHANGELOG.md", 40)):
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= most


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_each_page_begins_with_code_or_a_picture(page: Path) -> None:
    assert re.match(r"# .+\n\n(```|!\[)", page.read_text(encoding="utf-8"))


def test_the_site_begins_with_the_readme_and_its_links_lead_somewhere() -> None:
    hook = runpy.run_path(str(ROOT / "docs" / ".hooks" / "start.py"))["with_links_of_the_site"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]*)\)", readme)
    on_the_site = re.findall(r"\]\(([^)]*)\)", hook(readme, "repository/"))
    assert len(links) == len(on_the_site) > 10
    for link, there in zip(links, on_the_site, strict=True):
        assert there == (link[len("docs/") :] if link.startswith("docs/") else f"repository/{link}")
        assert (ROOT / link.partition("#")[0]).exists()


@pytest.mark.parametrize(
    ("html", "unresolved"),
    [
        ("<code><span>--8</span> <span>&lt;</span> --&quot;a.py&quot;</code>", 1),
        ("<p>--8&lt;-- &quot;a.py&quot;</p>", 1),
        ("<p>-8 and 8 &lt; 9</p>", 0),
    ],
)
def test_an_include_that_was_not_resolved_is_a_warning(
    html: str, unresolved: int, caplog: pytest.LogCaptureFixture
) -> None:
    hook = runpy.run_path(str(ROOT / "docs" / ".hooks" / "includes.py"))["on_page_content"]
    with caplog.at_level(logging.WARNING):
        hook(html, page=SimpleNamespace(file=SimpleNamespace(src_path="page.md")))
    assert len(caplog.records) == unresolved
    assert all("page.md: this include was not resolved: " in record.message for record in caplog.records)
