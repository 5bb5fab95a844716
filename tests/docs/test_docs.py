"""The code of the documentation runs by Sybil (see documentation.py); all other blocks say what they are."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_block_says_what_it_is() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    languages = [re.findall(r"^```(.*)\n(?:.*\n)*?```$", page.read_text(), re.MULTILINE) for page in pages]
    found = {language.strip() for of_page in languages for language in of_page}
    assert {"python", "pycon"} <= found <= {"python", "pycon", "console", "text"}
