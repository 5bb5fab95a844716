"""A hook of mkdocs: the site's first page is the README, with links that work on the site."""

import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[2] / "README.md"


def on_files(files: Any, config: Any) -> None:
    """Add the first page."""
    from mkdocs.structure.files import File

    text = README.read_text(encoding="utf-8")
    page = with_links_of_the_site(text, f"{config.repo_url.rstrip('/')}/blob/main/")
    files.append(File.generated(config, "index.md", content=page))


def with_links_of_the_site(text: str, repository: str) -> str:
    """The README's text: what is in ``docs`` is on the site, and all else in the repository."""

    def link(match: re.Match[str]) -> str:
        target = match[1]
        is_page = target.startswith("docs/")
        return f"]({target.removeprefix('docs/')})" if is_page else f"]({repository}{target})"

    return re.sub(r"\]\((?!https?:|#)([^)]*)\)", link, text)
