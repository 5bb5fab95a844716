"""A progress line below a program's own output."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from torchclip.cli.run.optimizer import OptimizerRecord

if TYPE_CHECKING:
    from rich.console import Console

_SECONDS = 0.5  # seconds between updates


class Progress:
    """Draws the line on stderr, a terminal, and removes it before the program writes anything.

    While the program's own last line is unfinished, such as a progress bar, there is no line.  There is none
    at all without a terminal, without rich, and on other ranks than the first.
    """

    def __init__(self) -> None:
        self._console: Console | None = None
        self._next = time.perf_counter() + _SECONDS
        self._shown = False
        self._proxies: dict[str, _ClearingStream] = {}

    def attach(self) -> None:
        """Wrap stdout and stderr if they are terminals."""
        shows = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
        if not shows or importlib.util.find_spec("rich") is None:
            return
        from rich.console import Console

        self._console = Console(file=sys.stderr, highlight=False)
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None and stream.isatty():
                self._proxies[name] = _ClearingStream(stream, self.clear)
                setattr(sys, name, self._proxies[name])

    def detach(self) -> None:
        """Remove the line, and restore the streams unless the program has replaced them."""
        self.clear()
        for name, proxy in self._proxies.items():
            if getattr(sys, name) is proxy:
                setattr(sys, name, proxy.stream)

    def __call__(self, optimizer: OptimizerRecord) -> None:
        """Redraw the line if it is time."""
        if self._console is None:
            return
        now = time.perf_counter()
        if now < self._next or not all(proxy.line_has_ended for proxy in self._proxies.values()):
            return
        self._next = now + _SECONDS
        text = f"torchclip: step {optimizer.steps:,}"
        if optimizer.on_host and len(optimizer.history):  # on other devices reading a value would wait
            record = optimizer.history[-1]
            clipped = f", clipped to {record.max_norm:.4g}" if record.clipped else ""
            text += f", norm {record.total_norm:.4g}{clipped}"
        self.clear()
        self._console.print(text[: self._console.width - 1], style="dim", end="", markup=False)
        self._shown = True

    def clear(self) -> None:
        """Remove the line."""
        if self._shown and self._console is not None:
            from rich.control import Control
            from rich.segment import ControlType

            self._shown = False
            self._console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))


class _ClearingStream:
    """A stream that calls a function before each write."""

    def __init__(self, stream: TextIO, before: Callable[[], None]) -> None:
        self.stream = stream
        self._before = before
        self.line_has_ended = True

    def write(self, text: str) -> int:
        """Write at once, as the stream does."""
        self._before()
        if text:
            self.line_has_ended = text.endswith("\n")
        return self.stream.write(text)

    def writelines(self, lines: Any) -> None:
        """Write at once, as the stream does."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __iter__(self) -> Any:
        return iter(self.stream)
