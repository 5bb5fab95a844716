"""What a clipper did in a step, as numbers for loggers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from torchclip._core import arguments
from torchclip.history.records import Record

__all__ = ["DictLogger", "Scalars"]


_WINDOW = 100  # the latest steps, of which ``clipped_share`` is a share


class Scalars:
    """Turns the records of one clipper into named numbers.

    Of every ``layers_every``-th step of a Clipper these include the norms of single parameters before
    clipping, such as ``clip_layers/head.weight``.

    Args:
        prefix: the beginning of the names, before a slash or before ``_layers``.

    Examples:
        >>> scalars = Scalars()
        >>> scalars(Record(0, 4.0, 1.0, 0.25, clipped=True, nonfinite=False, skipped=False, clipped_norm=1.0))
        {'clip/total_norm': 4.0, 'clip/clipped_norm': 1.0, 'clip/max_norm': 1.0, 'clip/clipped_share': 1.0}
    """

    def __init__(self, prefix: str = "clip") -> None:
        self._prefix = prefix
        self._clipped: deque[bool] = deque(maxlen=_WINDOW)

    def resume(self, history: Iterable[Record]) -> None:
        """Continue from a loaded history, so that the share of clipped steps does not start again."""
        self._clipped.clear()
        self._clipped.extend(record.clipped for record in history)

    def __call__(self, record: Record) -> dict[str, float]:
        """The numbers after a step; call it once for every step."""
        self._clipped.append(record.clipped)
        numbers = {
            f"{self._prefix}/total_norm": record.total_norm,
            f"{self._prefix}/clipped_norm": record.clipped_norm,
            f"{self._prefix}/max_norm": record.max_norm,
            f"{self._prefix}/clipped_share": sum(self._clipped) / len(self._clipped),
        }
        layers = {} if record.layers is None else record.layers
        return numbers | {f"{self._prefix}_layers/{name}": norm for name, norm in layers.items()}


class DictLogger:
    """For ``Clipper(on_clip=...)``: passes the numbers of every step to a function that takes a dictionary.

    For Weights & Biases, where they are logged together with the next values:

        on_clip=DictLogger(functools.partial(wandb.log, commit=False))

    Args:
        log: called with a dictionary of names and numbers after every step: norms before and after clipping,
            the threshold, the share of clipped steps, and the norms of single parameters if the Clipper has
            ``layers_every``.
        prefix: the beginning of the names, before a slash or before ``_layers``.

    Raises:
        TypeError: if ``log`` is not callable.

    Examples:
        >>> on_clip = DictLogger(print)
        >>> on_clip(Record(0, 4.0, 1.0, 0.25, clipped=True, nonfinite=False, skipped=False, clipped_norm=1.0))
        {'clip/total_norm': 4.0, 'clip/clipped_norm': 1.0, 'clip/max_norm': 1.0, 'clip/clipped_share': 1.0}
    """

    def __init__(self, log: Callable[[dict[str, float]], object], prefix: str = "clip") -> None:
        if not callable(log):
            raise TypeError(f"`log` must be callable, got {arguments.shown(log)}")
        self._log = log
        self._scalars = Scalars(prefix)

    def resume(self, history: Iterable[Record]) -> None:
        """Continue from a loaded history: ``on_clip.resume(clipper.history)``."""
        self._scalars.resume(history)

    def __call__(self, record: Record) -> None:
        """Log one step."""
        self._log(self._scalars(record))
