"""A hook of mkdocs: an include that was not resolved is a warning, and an error under ``--strict``.

Snippets leaves a line that it does not recognize as it is.  A formatter that puts a blank into the mark would
go unnoticed.
"""

import logging
import re
from typing import Any

log = logging.getLogger("mkdocs.hooks.includes")
MARK = re.compile(r"-\s*8\s*(?:<|&lt;)[^\n]*")


def on_page_content(html: str, page: Any, **_: object) -> None:
    """Look for marks on the finished page; the tags of highlighted code do not hide them."""
    for mark in MARK.findall(re.sub(r"<[^>]+>", "", html)):
        log.warning(f"{page.file.src_path}: this include was not resolved: {mark.strip()}")
