"""What clipping did, step by step."""

from torchclip.history.history import History, Record, Summary

__all__ = ["History", "Record", "Summary"]
