"""Clipping in TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torchclip._core import arguments
from torchclip.history.records import Record
from torchclip.integrations.loggers import Scalars

__all__ = ["ScalarLogger"]


class _Writer(Protocol):
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...


class ScalarLogger:
    """For ``Clipper(on_clip=...)``: writes norms, threshold and share of clipped steps as scalars:

        from torch.utils.tensorboard import SummaryWriter  # pip install 'torchclip[tensorboard]'

        clipper = torchclip.Clipper(optimizer, 1.0, on_clip=ScalarLogger(SummaryWriter()))

    With ``layers_every``, the norms of single parameters are scalars in a section of their own,
    ``clip_layers``.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or any object with its ``add_scalar``.
        prefix: the beginning of the tags, before a slash or before ``_layers``.

    Raises:
        TypeError: if ``writer`` has no ``add_scalar``.
    """

    def __init__(self, writer: _Writer, prefix: str = "clip") -> None:
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"`writer` must be a SummaryWriter, got {arguments.shown(writer)}")
        self._writer = writer
        self._scalars = Scalars(prefix)

    def resume(self, history: Iterable[Record]) -> None:
        """Continue from a loaded history: ``on_clip.resume(clipper.history)``."""
        self._scalars.resume(history)

    def __call__(self, record: Record) -> None:
        """Write one step."""
        for tag, value in self._scalars(record).items():
            self._writer.add_scalar(tag, value, record.step)
