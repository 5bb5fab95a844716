"""Clipping that belongs to an optimizer."""

from torchclip.clipper.clipper import Clipper
from torchclip.clipper.settings import Nonfinite, Scope

__all__ = ["Clipper", "Nonfinite", "Scope"]
