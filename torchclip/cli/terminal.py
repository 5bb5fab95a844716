"""The console of the commands: as wide as the terminal, and plain text without a terminal."""

from __future__ import annotations

import re
import sys
from typing import Any

from rich.console import Console

__all__ = ["console_for"]


def console_for(most: int, **options: Any) -> Console:
    """A console for stdout that is at most ``most`` columns wide.

    Output to a file or a pipe has no control characters, and no spaces at the ends of lines.
    """
    console = Console(**options)
    if not console.is_terminal:
        console = Console(file=_WithoutTrailingBlanks(), **options)  # type: ignore[arg-type]
    console.width = min(console.width, most)
    return console


class _WithoutTrailingBlanks:
    """Stdout, without the spaces with which tables fill each line."""

    def write(self, text: str) -> int:
        """Write whole lines, as rich does."""
        return sys.stdout.write(re.sub(" +\n", "\n", text))

    def flush(self) -> None:
        """Flush stdout."""
        sys.stdout.flush()

    def isatty(self) -> bool:
        """It is used only if stdout is not a terminal."""
        return False

    @property
    def encoding(self) -> str:
        """The encoding of stdout, by which rich chooses the lines of its tables."""
        return getattr(sys.stdout, "encoding", None) or "utf-8"
