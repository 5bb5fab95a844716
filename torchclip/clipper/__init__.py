"""Clipping that belongs to an optimizer."""

from torchclip.clipper.clipper import Clipper
from torchclip.clipper.nonfinite import Nonfinite
from torchclip.clipper.scope import Scope

__all__ = ["Clipper", "Nonfinite", "Scope"]
