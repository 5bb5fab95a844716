"""What clipping did, step by step."""

from torchclip.history.advice import Advice
from torchclip.history.history import History
from torchclip.history.records import Record
from torchclip.history.summary import Summary

__all__ = ["Advice", "History", "Record", "Summary"]
