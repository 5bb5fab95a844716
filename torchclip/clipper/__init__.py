"""Clipping that belongs to an optimizer."""

from torchclip.clipper.clipper import Clipper, Nonfinite, Scope

__all__ = ["Clipper", "Nonfinite", "Scope"]
